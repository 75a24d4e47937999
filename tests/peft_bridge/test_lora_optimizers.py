"""LoRA+ and LoRA-FA of PEFT: with both methods as with LoRA, or refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn

from aslora import ASLoRAConfig
from meft import MEFTConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer["mlp"](x)
        return x


CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["mlp.0"]),
    "aslora": lambda: ASLoRAConfig(r=2, target_modules=["mlp.0"], num_merges=0),
    "meft": lambda: MEFTConfig(r=8, num_experts=2, experts_per_token=2, top_k=4, target_modules=["mlp"]),
}


def step(model, optimizer):
    model(torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("method", ["lora", "aslora"])
def test_lora_plus_raises_the_rate_of_every_b(method):
    model = get_peft_model(Net(), CONFIGS[method]())
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=16)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {0.16}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-2}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    step(model, optimizer)
    for name, parameter in model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter, before[name] - 0.16 * parameter.grad)


def test_lora_plus_is_refused_for_rows():
    model = get_peft_model(Net(), CONFIGS["meft"]())
    with pytest.raises(ValueError, match=r"LoRA\+ cannot be used with parameters 'meft_\.\.\.'.*meft_values") as raised:
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["aslora", "meft"])
def test_lora_fa_is_refused(method):
    model = get_peft_model(Net(), CONFIGS[method]())
    with pytest.raises(ValueError, match=rf"LoRA-FA cannot be used with parameters '{method}_\.\.\.': .*AdamW"):
        create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-2)


def test_lora_fa_of_a_lora_is_pefts_own():
    model = get_peft_model(Net(), CONFIGS["lora"]())
    before = [p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name]
    step(model, create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-2))
    after = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
