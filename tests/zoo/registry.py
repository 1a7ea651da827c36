"""The zoo's entries: how a network is built and fed, and which taps it has, stated by hand.

A tap is named after the innermost module in whose forward the sign-like operation happens; the second, third...
binary activation of the same module object is NAME#2, NAME#3, in forward order. One tap a distinct binary
tensor, however many layers read it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import nets_block as block
from . import nets_layer as layer
from . import nets_module as module
from . import nets_structure as structure
from . import nets_untapped as untapped
from .common import ActConvNorm, Net


def images(batch, size=8):
    return torch.randn(batch, 3, size, size)


def features(batch):
    return torch.randn(batch, 48)


def tokens(batch):
    mask = torch.ones(batch, 6)
    mask[:, 5] = torch.arange(batch) % 2
    return {"input_ids": torch.randint(0, 20, (batch, 6)), "attention_mask": mask}


def sequences(batch):
    return torch.randn(batch, 6, 5), torch.arange(batch, 0, -1).clamp(max=6)


def graphs(batch):
    adjacency = (torch.rand(batch, 6, 6) > 0.5).float()
    return torch.randn(batch, 6, 5), torch.randint(0, 4, (batch, 6)), adjacency


@dataclass(frozen=True)
class Entry:
    """One network.

    taps: names of all taps in forward order. untapped: names that must be listed with a reason.
    oracle: (model in train mode, inputs) -> {tap: (a_F, a_B)}, recomputed without hooks; where several tensors
    are as good an a_F (before or after a clamp, say), a_F is a list of them. Only for taps where that is easy.
    first: the parameter that the gradient has to reach.
    """

    name: str
    build: Callable[[], nn.Module]
    taps: list[str]
    untapped: list[str] = field(default_factory=list)
    inputs: Callable[[int], Any] = images
    example_batch: int = 8
    oracle: Callable[[nn.Module, Any], dict] | None = None
    first: str = "stem.0.weight"

    def make(self, seed=0):
        """A fresh network in train mode; equal seeds give equal networks, without copying one."""
        torch.manual_seed(seed)
        return self.build().train()

    def example(self, batch=None, seed=1):
        torch.manual_seed(seed)
        return self.inputs(batch or self.example_batch)


def blocks(act):
    """Two blocks around an activation made by `act`."""
    return Net(ActConvNorm(act()), ActConvNorm(act()))


ACTS = ["body.0.act", "body.1.act"]
PAIR = ["body.0", "body.3"]  # the layers of nets_layer.two


def signed(transform=lambda m, x: m.stem(x), name=ACTS[0], code=torch.sign):
    """The oracle of a first tap: a_F from the stem on, a_B its code."""

    def oracle(model, x):
        a_f = transform(model, x)
        return {name: (a_f, code(a_f))}

    return oracle


def standardised(model, x):
    a = model.stem(x)
    a = a - a.mean([1, 2, 3], keepdim=True)
    return a / torch.sqrt(a.var([1, 2, 3], keepdim=True) + 1e-5)


def recu(model, x):
    a = model.stem(x)
    return a / torch.sqrt(a.var([1, 2, 3], keepdim=True) + 1e-5)


def dorefa(model, x):
    a = model.stem(x)
    return {ACTS[0]: ([a, a.clamp(0, 1)], a.clamp(0, 1).round())}


def adabin(name, get):
    def oracle(model, x):
        act, a = get(model), model.stem(x)
        shifted = (a - act.b) / act.a
        return {name: ([a, shifted], shifted.sign() * act.a + act.b)}

    return oracle


def reactnet(model, x):
    b = model.body[0]
    a = model.stem(x) + b.move1.bias
    return {"body.0.binary_activation": (a, a.sign())}


def boolnet(model, x):
    b = model.body[0]
    a = model.stem(x)
    y = F.batch_norm(a, None, None, b.bn2.weight, b.bn2.bias, True)
    z = F.batch_norm(a, None, None, b.bn1.weight, b.bn1.bias, True) + b.zero_point(y.sign())
    z = z.unsqueeze(1) + b.ghost_sign.slices
    return {
        "body.0": ([y, y.clamp(-1, 1)], y.sign()),
        "body.0.ghost_sign": ([z, z.clamp(-1, 1)], z.sign()),
    }


def scaled(dims):
    def oracle(model, x):
        a = model.stem(x)
        return {ACTS[0]: (a, a.sign() * a.abs().mean(dims, keepdim=True))}

    return oracle


ACT_ORACLES = {
    "where": signed(),
    "compare": signed(),
    "masked_assignment": signed(),
    "new_tensor": signed(code=lambda a: (a >= 0.2).float()),
    "heaviside": signed(code=lambda a: (a > 0).float()),
    "per_sample_scale": scaled((1, 2, 3)),
    "per_channel_scale": scaled((0, 2, 3)),
}


def abc(model, x):
    conv, a = model.body[0], model.stem(x)
    names = ["body.0", "body.0#2", "body.0#3"]
    return {name: (a + s, (a + s).sign()) for name, s in zip(names, conv.shift, strict=True)}


def binarynet_mlp(model, x):
    w = model.fc1.weight.sign()
    a = model.htanh1(F.batch_norm(F.linear(x, w, model.fc1.bias), None, None, training=True))
    return {"fc2": (a, a.sign())}


def bibert(model, x):
    a = model.norm(model.embeddings(x["input_ids"]))
    q, k = (block.split_heads(getattr(model.attention, n)(a), 2) for n in ("query", "key"))
    mask = (1.0 - x["attention_mask"][:, None, None, :]) * -100.0
    scores = q.sign() @ k.sign().transpose(-1, -2) / 8**0.5 + mask
    return {"attention: query": (q, q.sign()), "attention": (scores, (scores > 0).float())}


def pointnet(model, x):
    a = model.stem(x).transpose(2, 1)
    return {"transform": (a, a.sign())}


def unfold(model, x):
    a = model.stem(x)
    return {"body.0": (a, a.sign())}


def window(model, x):
    a = model.stem(x)
    B, C, H, W = a.shape
    a = a.view(B, C, H // 4, 4, W // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, C)
    return {"qkv": (a, a.sign())}


ROOT = "(model)"  # the network itself, whose own name in named_modules() is empty
BREVITAS = "act.act_quant.fused_activation_quant_proxy.tensor_quant"

ZOO = [
    # --- shape A: a module of its own ---------------------------------------------------------------------
    Entry("bireal_masks", module.bireal, ["body.0.binary_activation", "body.1.binary_activation"],
          oracle=signed(name="body.0.binary_activation")),
    Entry("bireal_detach", partial(blocks, module.ClampSign), ACTS, oracle=signed()),
    Entry("bireal_bottleneck", lambda: Net(module.BiRealBottleneck()),
          ["body.0.act", "body.0.act#2", "body.0.act#3"]),
    Entry("reactnet", module.reactnet,
          ["body.0.binary_activation", "body.0.binary_activation#2",
           "body.1.binary_activation", "body.1.binary_activation#2"], oracle=reactnet),
    Entry("dorefa", partial(blocks, module.DoReFaActivation), ACTS, oracle=dorefa),
    Entry("adabin_module", partial(blocks, module.AdaBinActivation), ACTS),
    Entry("bnext", lambda: Net(module.BNextBlock(), width_out=16),
          [f"body.0.{b}.binary_activation" for b in ("attention", "ffn_1", "ffn_2")]),
    Entry("boolnet", lambda: Net(module.BoolNetBlock(), module.BoolNetBlock()),
          ["body.0", "body.0.ghost_sign", "body.1", "body.1.ghost_sign"], oracle=boolnet),
    Entry("bitorch", lambda: Net(module.QConv2d(), nn.BatchNorm2d(8), module.QConv2d(), nn.BatchNorm2d(8)),
          ["body.0.activation.activation_function", "body.2.activation.activation_function"]),
    Entry("brevitas", partial(blocks, module.BrevitasIdentity), [f"body.0.{BREVITAS}", f"body.1.{BREVITAS}"],
          oracle=signed(name=f"body.0.{BREVITAS}", code=lambda a: a.sign() * 0.1)),
    Entry("rbonn", lambda: Net(module.RBONNBlock(), module.RBONNBlock()),
          ["body.0.binary_activation", "body.1.binary_activation"]),
    Entry("shared_instance", module.SharedActivation, ["layers.0.act", "layers.0.act#2", "layers.0.act#3"]),
    Entry("bernoulli", partial(blocks, module.BernoulliSign), ACTS),
    Entry("rand_compare", partial(blocks, module.RandCompareSign), ACTS),
    Entry("counting_calls", partial(blocks, module.CountingSign), ACTS),
    Entry("pooled_sign", lambda: Net(module.PooledSign(), module.PooledSign()), ACTS, oracle=signed()),
    Entry("concat", lambda: Net(module.ConcatSigns()), ["body.0.act1", "body.0.act2"],
          oracle=signed(name="body.0.act1")),
    *(Entry(f"act_{name}", partial(blocks, partial(module.Act, act)), ACTS, oracle=ACT_ORACLES.get(name))
      for name, act in module.ACTIVATIONS.items()),
    Entry("float64", lambda: blocks(module.ClampSign).double(), ACTS, inputs=lambda n: images(n).double()),
    # --- shapes B and D: inside a layer -------------------------------------------------------------------
    Entry("binarynet_inplace_mlp", layer.BinaryNetMLP, ["fc2", "fc3"], inputs=features, first="fc1.weight",
          oracle=binarynet_mlp),
    Entry("binarynet_inplace_cnn", layer.BinaryNetCNN, ["features.0", "features.4"]),
    Entry("binarynet_det", partial(layer.two, layer.BinarizeConv2d, mode="det"), PAIR),
    Entry("binarynet_stoch", partial(layer.two, layer.BinarizeConv2d, mode="stoch"), PAIR),
    Entry("irnet", partial(layer.two, layer.IRConv2d), PAIR, oracle=signed(name="body.0")),
    Entry("irnet_shortcut_signs_again", lambda: Net(layer.IRBlock(), width_out=16),
          ["body.0.conv1", "body.0.conv2"], oracle=signed(name="body.0.conv1")),
    Entry("rbnn", partial(layer.two, layer.RBNNConv2d), PAIR),
    Entry("recu", partial(layer.two, layer.ReCUConv2d), PAIR, oracle=signed(recu, "body.0")),
    Entry("siman", partial(layer.two, layer.SiMaNConv2d), PAIR),
    Entry("reste", partial(layer.two, layer.ReSTEConv2d), PAIR, oracle=signed(standardised, "body.0")),
    Entry("adabin_conv", partial(layer.two, layer.AdaBinConv2d), PAIR,
          oracle=adabin("body.0", lambda m: m.body[0])),
    Entry("abcnet", lambda: Net(layer.ABCConv2d(), nn.BatchNorm2d(8)), ["body.0", "body.0#2", "body.0#3"],
          oracle=abc),
    Entry("fracbnn", partial(layer.two, layer.FracBinaryConv2d), ["body.0.binarize", "body.3.binarize"]),
    Entry("expert", partial(layer.two, layer.ExpertConv2d), PAIR, oracle=signed(name="body.0")),
    Entry("folded_before_sign", lambda: Net(layer.IRConv2d(), nn.BatchNorm2d(8), layer.FoldedConv2d()),
          ["body.0"], untapped=["body.2"]),
    Entry("unfold_matmul", lambda: Net(layer.UnfoldConv2d(), nn.BatchNorm2d(8)), ["body.0"], oracle=unfold),
    Entry("conv3d", layer.conv3d, ["body.0"], inputs=lambda n: torch.randn(n, 3, 4, 4, 4),
          oracle=signed(name="body.0")),
    Entry("transposed", layer.transposed, ["body.0"],
          oracle=signed(lambda m, x: m.stem(x) - m.stem(x).mean((1, 2, 3), keepdim=True), "body.0")),
    # --- shape C and whole architectures ------------------------------------------------------------------
    Entry("xnornet", lambda: Net(block.XNORBlock(), block.XNORBlock()), ["body.0", "body.1"]),
    Entry("xnornet_dropout", lambda: Net(block.XNORBlock(dropout=0.5), block.XNORBlock(dropout=0.5)),
          ["body.0", "body.1"]),
    Entry("sign_in_root", block.SignInRoot, [f"{ROOT}: stem", f"{ROOT}: bn2"], inputs=lambda n: images(n, 4),
          oracle=lambda m, x: {f"{ROOT}: stem": ((a := m.stem(x.flatten(1))), a.sign())}),
    Entry("unused_branch", block.UnusedBranch, ["side_act"]),
    Entry("recurrent", block.RecurrentCell, ["cell", "cell#2", "cell#3"]),
    Entry("bibert", block.BiBERT,
          ["attention.query", "attention: query", "attention: key", "attention: value", "attention",
           "attention.dense", "intermediate", "output"],
          inputs=tokens, first="embeddings.weight", oracle=bibert),
    Entry("bit", block.BiT,
          ["attention.qkv", "attention: qkv", "attention: qkv#2", "attention: qkv#3", "attention", "up", "down"]),
    Entry("binaryvit", block.BinaryViT,
          ["attention.query", "attention: query", "attention: key", "attention: value", "attention", "mlp"]),
    Entry("fused_attention", block.FusedAttention, ["attend", "attend#2", f"{ROOT}: a", f"{ROOT}: b"]),
    Entry("windows", block.WindowNet, ["qkv", "proj"], oracle=window),
    Entry("bipointnet", block.BiPointNet, ["transform", "conv2.lin", "conv3", "fc1"],
          inputs=lambda n: torch.randn(n, 3, 12), oracle=pointnet),
    Entry("super_resolution", block.SuperResolution,
          ["body.0.binary_activation", "body.1.binary_activation", "up.binary_activation"]),
    Entry("segmentation", block.Segmentation, ["down.0", "up", "fuse.0"]),
    # --- sums, joins, scales, random structure, frozen and hidden parts -------------------------------------
    Entry("skipped_layers", lambda: Net(structure.SkippedLayers(rate=0.002)),
          [f"body.0.blocks.{i}.act" for i in range(5)]),
    Entry("residual_binarization", lambda: Net(structure.ResidualBinarization()), ["body.0", "body.0#2"]),
    Entry("sign_plus_noise", partial(blocks, structure.NoisySign), ACTS),
    Entry("codes_and_products", lambda: Net(structure.CodesAndProducts()), ["body.0.act"],
          oracle=signed(name="body.0.act")),
    Entry("token_scale", structure.TokenScale, [ROOT]),
    Entry("pixel_scale", partial(blocks, structure.PixelScale), ACTS, oracle=scaled((1,))),
    Entry("zero_threshold", partial(blocks, structure.ZeroThreshold), ACTS, oracle=signed()),
    Entry("dead_sign", lambda: Net(ActConvNorm(module.ClampSign()), ActConvNorm(structure.DeadSign())), ["body.0.act"],
          untapped=["body.1.act"]),
    Entry("hidden_product", lambda: Net(module.ClampSign(), structure.HiddenConv2d(), nn.BatchNorm2d(8)), ["body.0"],
          oracle=signed(name="body.0")),
    Entry("own_generator", lambda: Net(structure.LazyGenerator()), ["body.0.block.act"]),
    Entry("frozen_stem", structure.frozen_stem, ACTS, first="body.0.conv.weight"),
    Entry("packed_sequences", structure.Packed, [ROOT], inputs=sequences),
    # --- beside what must not be tapped -------------------------------------------------------------------
    Entry("no_grad_branch", lambda: Net(untapped.NoGradBranch()), ["body.0.main.act"],
          untapped=["body.0.encode"]),
    Entry("thermometer", untapped.ThermometerNet, ["block.act"]),
    Entry("binary_image", untapped.BinaryImage, ["conv"]),
    Entry("mixture_of_experts", lambda: Net(untapped.MixtureOfExperts()), ["body.0.act"]),
    Entry("gumbel_gate", lambda: Net(untapped.GumbelGate(), ActConvNorm(module.ClampSign())), ["body.1.act"]),
    Entry("graph", untapped.GraphNet, [ROOT], inputs=graphs),
    Entry("squeeze_excite_one_image", lambda: Net(untapped.SqueezeExcite(), ActConvNorm(module.ClampSign())),
          ["body.1.act"], example_batch=1),
    Entry("norm_of_two_images", lambda: Net(untapped.NormOfPooled(), ActConvNorm(module.ClampSign())),
          ["body.1.act"], example_batch=2),
    # --- nothing to tap ------------------------------------------------------------------------------------
    Entry("masks", lambda: Net(untapped.MaskNet()), []),
    Entry("relu", untapped.relu_net, []),
    Entry("saturated", lambda: Net(untapped.SaturatedGate()), []),
    Entry("binary_weights", untapped.binary_weights, []),
    Entry("additive_noise", untapped.additive_noise, []),
]  # fmt: skip
