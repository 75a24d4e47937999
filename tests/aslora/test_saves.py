"""What is given to a save: the whole state, the parameters alone, or a part, which is refused."""

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

FILE = "adapter_model.safetensors"


@torch.no_grad()
def output(tiny, model):
    return model.eval()(tiny.inputs(model, 50))


def detached(named):
    return {name: p.detach().clone() for name, p in named}


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "all"])
def test_the_parameters_alone_are_saved_as_the_same_model(tiny, tmp_path, steps, trainable):
    model = tiny.adapted(dtype=torch.float32, modules_to_save=["head"])
    tiny.train(model, steps)
    given = detached((n, p) for n, p in model.named_parameters() if p.requires_grad or not trainable)
    model.save_pretrained(tmp_path / "parameters", state_dict=given)
    loaded = PeftModel.from_pretrained(tiny.net(dtype=torch.float32), tmp_path / "parameters", is_trainable=True)
    assert torch.equal(output(tiny, loaded), output(tiny, model))
    assert tiny.taken(loaded) == tiny.taken(model)
    model.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / name / FILE).stat().st_size for name in ("parameters", "whole")]
    assert sizes[0] <= sizes[1]  # live rows only; no averages
    tiny.train(loaded, 2)
    for B in tiny.groups(loaded).values():
        assert torch.equal(B.stacked_B, B.stacked_B[B.sharing_map])


def test_a_parameters_only_state_is_written_again_bit_for_bit(tiny, tmp_path):
    model = tiny.adapted()
    tiny.train(model, 6)
    model.save_pretrained(tmp_path / "first", state_dict=detached(model.named_parameters()))
    PeftModel.from_pretrained(tiny.net(), tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / FILE) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())


PARTS = {
    "without A": lambda name: "shared_A" not in name,
    "without B": lambda name: "stacked_B" not in name,
    "one projection": lambda name: "~v=" not in name or "aslora_B" not in name,
    "nothing of the adapter": lambda name: "aslora_" not in name,
    "buffers alone": lambda name: "shared_A" not in name and "stacked_B" not in name,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_adapter_is_refused_and_nothing_is_written(tiny, tmp_path, part):
    model = tiny.adapted()
    tiny.train(model, 2)
    given = {name: value for name, value in model.state_dict().items() if PARTS[part](name)}
    with pytest.raises(ValueError, match=r"state_dict to save has no base_model\.aslora_[AB]\..*give all parameters"):
        model.save_pretrained(tmp_path, state_dict=given)
    assert not (tmp_path / FILE).exists()


def test_a_part_of_the_rows_is_refused(tiny, tmp_path):
    model = tiny.adapted()
    given = detached(model.named_parameters())
    key = next(name for name in given if name.endswith("stacked_B"))
    given[key] = given[key][:2]
    with pytest.raises(ValueError, match="has 2 rows for 4 layers"):
        model.save_pretrained(tmp_path, state_dict=given)


@pytest.mark.parametrize("absent", ["rows", "layers", "clock", "history", "distances", "average"])
def test_without_one_of_the_buffers_the_rows_say_what_is_shared(tiny, tmp_path, absent):
    model = tiny.adapted()
    tiny.train(model, 3)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if not k.endswith(absent)})
    loaded = PeftModel.from_pretrained(tiny.net(), tmp_path)
    assert torch.equal(output(tiny, loaded), output(tiny, model))
    assert tiny.taken(loaded) == {"q": 1, "v": 1}
    assert all(B.finished for B in tiny.groups(loaded).values())


@pytest.mark.parametrize("written", ["rows of B", "the map", "the history"])
def test_a_map_that_the_rows_do_not_bear_out_is_saved_as_what_they_are(tiny, tmp_path, written):
    model = tiny.adapted()
    tiny.train(model, 3)
    B = tiny.groups(model)["q"]
    with torch.no_grad():
        if written == "rows of B":
            B.stacked_B[B.ties.mirrored[0]].zero_().add_(0.5)
        elif written == "the map":
            B.rows.copy_(torch.tensor([3, 3, 3, 3]))
        else:
            B.history.fill_(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.net(), tmp_path)
    assert torch.equal(output(tiny, loaded), output(tiny, model))
    ours = tiny.groups(loaded)["q"]
    assert ours.finished
    assert ours.merges_taken == (0 if written == "rows of B" else 1)
    assert not tiny.groups(loaded)["v"].finished


def test_an_adapter_beside_another_one_is_saved_from_its_own_parameters(tiny, tmp_path):
    model = tiny.adapted()
    tiny.train(model, 6)
    model.add_adapter("other", tiny.config(r=3))
    given = detached((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path / "both", state_dict=given)
    model.save_pretrained(tmp_path, state_dict=given, selected_adapters=["default"])
    assert torch.equal(output(tiny, PeftModel.from_pretrained(tiny.net(), tmp_path)), output(tiny, model))


def test_a_file_whose_shared_rows_were_changed_apart_is_not_possible(tiny, tmp_path):
    """A file holds a shared row once: a state that is loaded from it is whole."""
    model = tiny.adapted()
    tiny.train(model, 6)
    model.save_pretrained(tmp_path)
    tensors = {k: v for k, v in load_file(tmp_path / FILE).items() if not k.endswith("digest")}
    for name, value in tensors.items():
        if name.endswith("stacked_B"):
            value.mul_(2)
    set_peft_model_state_dict(model, tensors)
    for B in tiny.groups(model).values():
        assert len(B.ties.mirrored) == 2
        assert torch.equal(B.stacked_B, B.stacked_B[B.ties.owners])
