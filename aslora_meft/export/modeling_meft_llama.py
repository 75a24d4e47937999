"""A Llama whose FFNs have MEFT's sparse neurons beside them (arXiv 2406.04984), for inference.

Written by `aslora-meft export --to model`; needs torch and transformers only. Per token a router picks groups of
neurons, and the best neurons of these groups add ReLU(score) * value to the FFN's output. One token reads the router,
the keys of its groups and the values of its neurons, and no other rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class MeftLlamaConfig(LlamaConfig):
    """Adds `meft`: r, num_experts, experts_per_token, top_k, router_factor, and the numbers of the layers with MEFT."""

    model_type = "meft_llama"
    # The FFN of a layer with MEFT has moved one name down. MEFT's parts are in no plan: each rank has them whole, and
    # adds them after the FFN's own reduction, so that they count once.
    base_model_tp_plan = {
        name.replace(".mlp.", ".mlp.ffn."): style for name, style in (LlamaConfig.base_model_tp_plan or {}).items()
    }

    def __init__(self, meft=None, **kwargs):
        self.meft = meft
        super().__init__(**kwargs)


def gathered(x: Tensor, keys: Tensor, experts: Tensor) -> Tensor:
    """Reads only the keys of the tokens' experts, once for each token. As all forms: float32 [T, P, k]."""
    return torch.bmm(keys[experts].flatten(1, 2).float(), x.float().unsqueeze(2)).view(*experts.shape, keys.shape[1])


def dense(x: Tensor, keys: Tensor, experts: Tensor) -> Tensor:
    """All keys in one product. Nothing waits for the device, so that a graph can be captured."""
    flat = keys.flatten(0, 1).T
    wide = x.dtype == torch.float32 or not x.is_cuda
    full = x.float() @ flat.float() if wide else torch.mm(x, flat, out_dtype=torch.float32)
    return full.view(-1, *keys.shape[:2]).take_along_dim(experts.unsqueeze(2), dim=1)


def grouped(x: Tensor, keys: Tensor, experts: Tensor) -> Tensor:
    """A product for each expert, of all its tokens."""
    order = experts.flatten().argsort()
    parts = order.split(experts.flatten().bincount(minlength=len(keys)).tolist())
    dots = [x[part // experts.shape[1]].float() @ key.float().T for part, key in zip(parts, keys, strict=True)]
    return torch.cat(dots)[order.argsort()].view(*experts.shape, keys.shape[1])


# On a CPU: multiplications an expert up to which one large product is faster than E small ones (measured).
DENSE_UP_TO = 2**20


def dots_of_experts(x: Tensor, keys: Tensor, experts: Tensor) -> Tensor:
    """x [T, d] times the keys [E, k, d] of each token's experts [T, P]: float32 [T, P, k], in the fastest form."""
    E, k, d = keys.shape
    if len(x) == 1 or 4 * experts.numel() <= E:  # they are read, copied and read again
        return gathered(x, keys, experts)
    return (dense if x.is_cuda or len(x) * k * d <= DENSE_UP_TO else grouped)(x, keys, experts)


def added_by_neurons(
    x: Tensor, router: Tensor, keys: Tensor, values: Tensor, experts_per_token: int, top_k: int, router_factor: bool
) -> Tensor:
    """What the neurons add to the FFN's output for x [T, d]. Equal scores go to the lower id."""
    logits = x.float() @ router.float().T
    experts = logits.sort(descending=True, stable=True).indices[:, :experts_per_token].sort().values
    scores = dots_of_experts(x, keys, experts)
    if router_factor:
        scores = scores * logits.gather(1, experts).unsqueeze(2)
    ids = experts.unsqueeze(2) * keys.shape[1] + torch.arange(keys.shape[1], device=x.device)
    scores, best = scores.flatten(1).sort(descending=True, stable=True)
    scores, best = scores[:, :top_k].relu(), best[:, :top_k]
    ids = ids.flatten(1).gather(1, best)
    return F.embedding_bag(ids, values, per_sample_weights=scores.to(values.dtype), mode="sum").to(x.dtype)


# A compiler sees one operation, which chooses its form when it runs. Another model's file may have made it already.
if not hasattr(torch.ops.meft, "added_by_neurons"):
    torch.library.custom_op("meft::added_by_neurons", added_by_neurons, mutates_args=())
    torch.library.register_fake("meft::added_by_neurons", lambda x, *args: torch.empty_like(x))


class MeftNeurons(nn.Module):
    """r neurons with a key and a value each, in groups of one size, and a router: one expert is one group."""

    def __init__(self, config: MeftLlamaConfig):
        super().__init__()
        meft, d = config.meft, config.hidden_size
        self.choice = meft["experts_per_token"], meft["top_k"], meft["router_factor"]
        self.router = nn.Parameter(torch.empty(meft["num_experts"], d))
        self.keys = nn.Parameter(torch.empty(meft["num_experts"], meft["r"] // meft["num_experts"], d))
        self.values = nn.Parameter(torch.empty(meft["r"], d))

    def forward(self, x: Tensor) -> Tensor:
        added = torch.ops.meft.added_by_neurons if torch.compiler.is_compiling() else added_by_neurons
        return added(x.flatten(0, -2), self.router, self.keys, self.values, *self.choice).view_as(x)


class MeftFFN(nn.Module):
    """A layer's FFN with neurons beside it."""

    def __init__(self, ffn: nn.Module, config: MeftLlamaConfig):
        super().__init__()
        self.ffn, self.neurons = ffn, MeftNeurons(config)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.ffn(x, *args, **kwargs) + self.neurons(x)


class MeftLlamaModel(LlamaModel):
    """The base model, which servers build by itself."""

    config_class = MeftLlamaConfig
    _keep_in_fp32_modules_strict = ["neurons.router"]  # it decides, and is small

    def __init__(self, config: MeftLlamaConfig):
        super().__init__(config)
        for i in config.meft["layers"]:
            self.layers[i].mlp = MeftFFN(self.layers[i].mlp, config)
        self.post_init()


class MeftLlamaForCausalLM(LlamaForCausalLM):
    config_class = MeftLlamaConfig
    _keep_in_fp32_modules_strict = ["neurons.router"]

    def __init__(self, config: MeftLlamaConfig):
        super().__init__(config)
        self.model = MeftLlamaModel(config)
        self.post_init()
