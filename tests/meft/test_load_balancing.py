"""The gradient of the balance loss against autograd of an explicit sum that is added to the loss."""

import functools

import pytest
import torch
from peft import get_peft_model
from torch import nn

from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.load_balancing import balance_loss
from tests.support.models import llama

WEIGHT = 0.3


def adapted(checkpointing=None, **fields):
    """A Llama of two layers in float64; checkpointing: None, or whether it is reentrant."""
    model = llama(dtype=torch.float64, num_key_value_heads=2)
    sizes = {"r": 16, "num_experts": 4, "experts_per_token": 2, "top_k": 3, "init_weights": False}
    config = MEFTConfig(
        **sizes | {"task_type": "CAUSAL_LM", "master_dtype": "float64", "router_aux_loss_coef": WEIGHT} | fields
    )
    model = get_peft_model(model, config)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    return model.train()


def batch(seed, padding=0):
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 7 - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def explicit(logits, P):
    """E sum_e f_e P_e of one layer in plain words."""
    T, E = logits.shape
    probes = [0] * E
    for row in logits.tolist():
        for e in sorted(range(E), key=lambda e: (-row[e], e))[:P]:
            probes[e] += 1
    return E * sum(probes[e] / (T * P) * logits.softmax(-1)[:, e].mean() for e in range(E))


def loss_with_explicit_sum(model, inputs):
    """The model's loss without its own balance loss, and the mean over layers of the explicit one added to it."""
    layers = [m for m in model.modules() if isinstance(m, MEFTLayer)]
    seen, handles = [], []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(lambda module, args: seen.append((module, args[0]))))
        layer.configs["default"].router_aux_loss_coef = 0.0
    loss = model(**inputs).loss
    for handle in handles:
        handle.remove()
    real = inputs["attention_mask"].bool()
    sums = [explicit(x[real] @ layer.router("default").T, 2) for layer, x in seen]
    assert len(sums) == len(layers) == 2
    return loss + WEIGHT * sum(sums) / len(sums)


def gradients(model):
    return {
        name: p.grad.to_dense() if hasattr(p.grad, "to_dense") and "rows" in name else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_equal_gradients(ours, theirs):
    ours, theirs = gradients(ours), gradients(theirs)
    assert len(ours) == 6
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


CHECKPOINTING = pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])


def test_the_loss_of_a_layer_equals_loops_and_is_one_where_the_load_is_even():
    config = MEFTConfig(r=16, num_experts=4, experts_per_token=2, top_k=3)
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ours, expected = balance_loss(logits, config), explicit(logits, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    even = torch.eye(4, dtype=torch.float64) + torch.eye(4, dtype=torch.float64).roll(1, 0)
    assert balance_loss(even, config).item() == pytest.approx(1.0, abs=1e-14)
    one_sided = torch.tensor([[50.0, 50.0, 0.0, 0.0]], dtype=torch.float64)
    assert balance_loss(one_sided, config).item() == pytest.approx(2.0, abs=1e-12)


@CHECKPOINTING
@pytest.mark.parametrize("padding", [0, 3])
def test_it_equals_an_explicit_sum_in_the_loss(checkpointing, padding):
    ours, theirs, plain = adapted(checkpointing), adapted(), adapted(router_aux_loss_coef=0.0)
    ours(**batch(1, padding)).loss.backward()
    loss_with_explicit_sum(theirs, batch(1, padding)).backward()
    assert_equal_gradients(ours, theirs)
    plain(**batch(1, padding)).loss.backward()
    name = next(n for n in gradients(plain) if "router" in n)
    assert not torch.allclose(gradients(plain)[name], gradients(ours)[name], rtol=1e-3)  # it does something


@CHECKPOINTING
def test_it_is_scaled_and_accumulated_as_the_loss_is(checkpointing):
    ours, theirs = adapted(checkpointing), adapted()
    for seed, factor in ((1, 0.25), (2, 0.25), (3, 1024.0)):
        (ours(**batch(seed)).loss * factor).backward()
        (loss_with_explicit_sum(theirs, batch(seed)) * factor).backward()
    assert_equal_gradients(ours, theirs)


@CHECKPOINTING
def test_passes_that_are_alive_together_have_their_own_scales(checkpointing):
    ours, theirs = adapted(checkpointing), adapted()
    losses = [ours(**batch(seed)).loss for seed in (1, 2)]
    expected = [loss_with_explicit_sum(theirs, batch(seed)) for seed in (1, 2)]
    (losses[0] * 0.5 + losses[1] * 3).backward()
    (expected[0] * 0.5 + expected[1] * 3).backward()
    assert_equal_gradients(ours, theirs)


def test_the_reported_loss_has_no_balance_loss_in_it():
    with_loss, without = adapted(), adapted(router_aux_loss_coef=0.0)
    assert torch.equal(with_loss(**batch(1)).loss, without(**batch(1)).loss)


def test_without_a_loss_of_the_model_it_counts_in_full():
    ours, theirs = adapted(), adapted()
    inputs = batch(1)
    labels = inputs.pop("labels")
    logits = ours(**inputs).logits
    logits = logits.float()  # as transformers does
    nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), labels[:, 1:].reshape(-1)).backward()
    loss_with_explicit_sum(theirs, batch(1)).backward()
    assert_equal_gradients(ours, theirs)


def test_it_trains_the_router_even_where_the_scores_do_not():
    model = adapted(router_factor=False)
    model(**batch(1)).loss.backward()
    assert all(g.any() for name, g in gradients(model).items() if "router" in name)


def test_evaluation_computes_none_of_it(monkeypatch):
    model = adapted()
    monkeypatch.setattr("meft.layer.attach_balance_loss", functools.partial(pytest.fail, "called"))
    with torch.no_grad():
        model(**batch(1))
    with torch.inference_mode():
        model(**batch(1))
