"""Training as users do it: a plain Trainer at its defaults, long runs, and threads that read while steps run."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from meft import RowAdamW
from meft.retrieval import engine, sparse_ffn
from meft.retrieval import forward_context as context
from meft.retrieval.strategies import in_place
from meft.routing import topk


def dataset(tiny, rows=16):
    batch = tiny.batch(rows, 8, seed=1)
    return [{"input_ids": row, "labels": row} for row in batch]


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def arguments(folder, cls=TrainingArguments, **fields):
    return cls(
        output_dir=str(folder),
        max_steps=20,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **fields,
    )


@pytest.mark.parametrize(
    "fields",
    [{}, {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}],
    ids=["defaults", "bf16, checkpointing, accumulation"],
)
def test_a_plain_trainer_lowers_the_loss_with_the_adapter_alone(tiny, tmp_path, fields):
    base = tiny.base(dtype=torch.float32)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, tiny.config(init_weights=True, r=128, num_experts=16, top_k=16))
    trainer = Trainer(model, arguments(tmp_path, learning_rate=2e-2, **fields), train_dataset=dataset(tiny))
    trainer.train()
    losses = losses_of(trainer)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.5
    state = model.state_dict()
    for name, value in frozen.items():
        name = name.replace(".mlp.", ".mlp.base_layer.")
        assert torch.equal(state[f"base_model.model.{name}"], value), name
    for table in tiny.tables(model):
        assert table.rows.grad is None
    assert set(tiny.most_touches(model)) == {20}
    # Nothing of the tables is in the optimizer's state: only the routers' moments are.
    state = trainer.optimizer.state
    assert len(state) == 6
    assert sum(entry.keys() == {"step", "row_moments"} for entry in state.values()) == 4


@pytest.mark.parametrize("retrieval", ["auto", "stream"])
def test_a_trainers_logs_tell_what_was_moved(tiny, tmp_path, retrieval):
    model = get_peft_model(tiny.base(dtype=torch.float32), tiny.config(retrieval=retrieval))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset(tiny))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 20
    for entry in logged:
        assert 0 < entry["meft/union_share"] <= 1
        # Rows that are read in place do not move.
        assert (entry["meft/mib_to_device"] > 0) == (entry["meft/mib_to_host"] > 0) == (retrieval != "auto")
    total = model.base_model.transfer_report().to_dict()["bytes_to_host"] / 2**20
    assert sum(entry["meft/mib_to_host"] for entry in logged) == pytest.approx(total)
    assert "meft/union_share" not in trainer.state.log_history[-1]  # the run's summary, which has no loss


def test_the_schedules_learning_rate_is_the_rows(tiny, tmp_path):
    """At a learning rate of zero nothing moves, weight decay included."""
    model = tiny.adapted(dtype=torch.float32)
    before = tiny.state(model)
    fields = {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 1000, "weight_decay": 0.1}
    args = arguments(tmp_path, **fields)
    args.max_steps = 1
    Trainer(model, args, train_dataset=dataset(tiny)).train()
    tiny.assert_equal(tiny.state(model), before)
    assert set(tiny.most_touches(model)) == {1}


def test_a_trainer_with_an_optimizer_that_has_no_rule_stops_before_anything_moves(tiny, tmp_path):
    model = tiny.adapted(dtype=torch.float32)
    before = tiny.state(model)
    trainer = Trainer(model, arguments(tmp_path, optim="sgd"), train_dataset=dataset(tiny))
    with pytest.raises(ValueError, match=r"SGD is neither: use.*meft\.RowAdamW"):
        trainer.train()
    tiny.assert_equal(tiny.state(model), before)


def test_trls_sft_trainer_lowers_the_loss_at_its_defaults(tiny, tmp_path):
    """Its own wrapping of the model, bf16 and gradient checkpointing included."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    words = {f"w{i}": i for i in range(tiny.VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w3")
    texts = [" ".join(f"w{token}" for token in row.tolist()) for row in tiny.batch(16, 8, seed=1)]
    trainer = trl.SFTTrainer(
        tiny.base(dtype=torch.float32),
        args=arguments(tmp_path, trl.SFTConfig, learning_rate=2e-2),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=tiny.config(init_weights=True, r=128, num_experts=16, task_type="CAUSAL_LM"),
    )
    assert trainer.args.gradient_checkpointing
    assert trainer.args.max_grad_norm == 1.0
    trainer.train()
    losses = losses_of(trainer)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.5
    assert set(tiny.most_touches(trainer.model)) == {20}


# ---------------------------------------------------------------------- threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_that_read_while_steps_run_see_whole_rows(tiny, dtype):
    """All values of a row are equal, and stay so: each has the same gradient. A torn row would have two values."""
    model = tiny.adapted(1, dtype, r=4096, num_experts=64)
    (keys, values) = tiny.tables(model)
    with torch.no_grad():
        for table in (keys, values):
            table.rows.copy_(torch.rand(4096, 1).expand(-1, tiny.WIDTH))
    optimizer = tiny.adamw(model, lr=0.1)
    done, torn, reads, errors = threading.Event(), [], [0, 0], []

    def read(number):
        try:
            while not done.is_set() or not reads[number]:
                with torch.no_grad():
                    model(input_ids=tiny.batch(1, 4, seed=number))
                for table in (keys, values):
                    with table.reading() as rows:
                        seen = rows.clone()
                    if bool((seen != seen[:, :1]).any()):
                        torn.append(number)
                reads[number] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        for step in range(40):
            generator = torch.Generator().manual_seed(step)
            for table in (keys, values):
                table.rows.grad = torch.randn(4096, 1, generator=generator).expand(-1, tiny.WIDTH).clone()
            optimizer.step()
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=60)
    assert not errors
    assert not torn
    assert min(reads) > 0
    assert tiny.most_touches(model) == [40, 40]
    assert context.current() is None


def test_threads_that_call_the_model_give_a_version_of_it_and_not_a_mixture(tiny):
    """One layer; between steps of the keys alone, outputs are of before or after a step."""
    model = tiny.adapted(1, torch.float64, top_k=48, experts_per_token=8, router_factor=False)
    keys, _ = tiny.tables(model)
    optimizer = RowAdamW([keys.rows], lr=0.05)
    ids = tiny.batch(1, 4)
    done, seen, errors = threading.Event(), [], []

    def read():
        try:
            while not done.is_set() or len(seen) < 2:
                with torch.no_grad():
                    seen.append(model(input_ids=ids).logits)
        except Exception as error:
            errors.append(error)

    def output():
        with torch.no_grad():
            return model(input_ids=ids).logits

    versions = [output()]
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            keys.rows.grad = torch.randn(keys.rows.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
            versions.append(output())
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=60)
    assert not errors
    known = torch.stack(versions)
    assert (known[1:] - known[:-1]).abs().amax((1, 2, 3)).min() > 1e-6
    for logits in seen:
        assert (known - logits).abs().amax((1, 2, 3)).min() < 1e-12


def test_a_step_of_another_thread_while_gradients_are_made_is_noticed(tiny, monkeypatch):
    """Between the look at the versions and the lock."""
    model = tiny.adapted(1)
    _, values = tiny.tables(model)
    inner = sparse_ffn.table_ffn_backward

    def stepped(*args, **kwargs):
        with torch.no_grad():
            values.rows.mul_(1.5)
        return inner(*args, **kwargs)

    monkeypatch.setattr(sparse_ffn, "table_ffn_backward", stepped)
    loss = tiny.loss(model)
    with pytest.raises(RuntimeError, match="updated"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_rows_are_held_still_while_they_are_read_in_place(tiny, monkeypatch, grad, dtype):
    """Another thread cannot step them then."""
    model = tiny.adapted(1, torch.float32, row_dtype=str(dtype).removeprefix("torch."))
    held = []

    def is_free(lock):
        if taken := lock.acquire(blocking=False):
            lock.release()
        return taken

    def watched(module, name, *tables):
        inner = getattr(module, name)

        def read(*args, **kwargs):
            with ThreadPoolExecutor(1) as other:
                free = [other.submit(is_free, table.lock).result() for table in tables]
            held.append((name, free))
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, read)

    keys, values = tiny.tables(model)
    watched(topk, "select_neurons", keys)
    watched(in_place, "_rows_in", keys, values)
    expected = {"select_neurons", "_rows_in"}
    if dtype == torch.float32:
        watched(sparse_ffn if grad else engine, "table_ffn", values)
        expected.add("table_ffn")
        if grad:
            watched(sparse_ffn, "table_ffn_backward", keys, values)
            expected.add("table_ffn_backward")
    with torch.set_grad_enabled(grad):
        loss = tiny.loss(model)
    if grad:
        loss.backward()
    assert {name for name, _ in held} == expected
    assert not any(free for _, tables in held for free in tables)


def test_padding_of_one_thread_is_not_that_of_another(tiny):
    model = tiny.adapted(1).eval()
    ids = tiny.batch(2, 6)
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[1][:, 4:] = 0
    with torch.no_grad():
        expected = [model(input_ids=ids, attention_mask=m).logits for m in masks]
    errors = []

    def run(number):
        try:
            for _ in range(30):
                with torch.no_grad():
                    found = model(input_ids=ids, attention_mask=masks[number]).logits
                assert torch.equal(found, expected[number])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors


# ---------------------------------------------------------------------- long runs


def living():
    """Tensors that are alive, and the bytes of their storages."""
    gc.collect()
    storages = {}
    count = 0
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            count += 1
            if type(thing) is torch.Tensor and not thing.is_meta and thing.layout == torch.strided:
                storages[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return count, sum(storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_hundred_steps_of_random_lengths_hold_no_more_than_thirty(tiny, checkpointing):
    model = tiny.adapted(1, torch.bfloat16)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = tiny.adamw(model, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    others = list(context._alive)
    after = {}
    for step in range(1, 101):
        rows, length = torch.randint(1, 4, (2,), generator=generator).tolist()
        tiny.train(model, 1, optimizer, first=step, rows=rows, length=4 * length)
        if step in (30, 100):
            optimizer.zero_grad()
            for table in tiny.tables(model):
                table.synchronize()
            after[step] = living()
    assert after[100][0] <= after[30][0] + 5
    assert after[100][1] <= after[30][1] + 4096
    assert not [opened for opened in context._alive if opened not in others]
