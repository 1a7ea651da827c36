"""One small network of every timm family, and the binary layers of two example methods to put into it."""

from __future__ import annotations

from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

from binarize import IRLinear
from bodies import ApproxSign, IRConv2d, MagnitudeAwareConv2d, magnitude_aware


def _small(name: str, size: int, **smaller) -> tuple[str, int, dict]:
    """An entry of timm, the size of its images, and what makes it smaller than it comes."""
    return name, size, smaller


# Sizes and depths are the smallest that keep every kind of block of the family.
FAMILIES = {
    "beit": _small("beit_base_patch16_224", 64, img_size=64, depth=2, embed_dim=96, num_heads=3),
    "byoanet": _small("eca_botnext26ts_256", 64, img_size=64),
    "byobnet": _small("test_byobnet", 64),
    "cait": _small("cait_xxs24_224", 64, img_size=64, depth=2),
    "coat": _small("coat_tiny", 64, img_size=64, serial_depths=(1, 1, 1, 1), parallel_depth=1),
    "convit": _small("convit_tiny", 64, img_size=64, depth=3, local_up_to_layer=2),
    "convmixer": _small("convmixer_768_32", 21),
    "convnext": _small("test_convnext", 64, drop_path_rate=0.2),
    "cpubone": _small("cpubone_nano", 64),
    "crossvit": _small("crossvit_tiny_240", 60, img_size=60, img_scale=(1.0, 0.8), depth=[[1, 1, 0]] * 2),
    "csatv2": _small("csatv2", 128, depths=(1, 1, 2, 2), transformer_depths=(0, 0, 1, 1)),
    "cspnet": _small("cs3darknet_s", 64),
    "cspnext": _small("cspnext_tiny", 64),
    "davit": _small("davit_tiny", 64, depths=(1, 1, 1, 1), embed_dims=(24, 48, 96, 192), num_heads=(1, 2, 3, 6)),
    "deepseek_vit": _small("deepseek_vit_412m", 56, img_size=56, depth=2, embed_dim=96, num_heads=3),
    "deit": _small("deit_tiny_distilled_patch16_224", 64, img_size=64, depth=2, drop_path_rate=0.2),
    "densenet": _small("densenet121", 64, block_config=(2, 2, 2, 2)),
    "dla": _small("dla46x_c", 64),
    "dpn": _small("dpn48b", 64),
    "edgenext": _small("edgenext_xx_small", 64),
    "efficientformer": _small("efficientformer_l1", 224),
    "efficientformer_v2": _small("efficientformerv2_s0", 64, img_size=64),
    "efficientnet": _small("test_efficientnet", 64, drop_path_rate=0.2),
    "efficientvim": _small("efficientvim_m1", 64),
    "efficientvit_mit": _small("efficientvit_b0", 64),
    "efficientvit_msra": _small("efficientvit_m0", 64, img_size=64),
    "eva": _small("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    "fasternet": _small("fasternet_t0", 64),
    "fastvit": _small("fastvit_t8", 64),
    "focalnet": _small("focalnet_tiny_srf", 64, use_post_norm_in_modulation=True),
    "gcvit": _small("gcvit_xxtiny", 64, img_size=64, window_ratio=(32, 32, 16, 32)),
    "gemma4_vit": _small("gemma4_vit_167m", 96, depth=2),
    "ghostnet": _small("ghostnet_050", 64),
    "hardcorenas": _small("hardcorenas_a", 64),
    "hgnet": _small("hgnetv2_b0", 64),
    "hiera": _small("hiera_tiny_224", 64, img_size=64, embed_dim=32, stages=(1, 2, 2, 1)),
    "hieradet_sam2": _small("hieradet_small", 64, embed_dim=24, stages=(1, 1, 2, 1), global_att_blocks=(3,)),
    "hrnet": _small("hrnet_w18_small", 64),
    "iformer": _small("iformer_t", 64),
    "inception_next": _small("inception_next_atto", 64),
    "inception_resnet_v2": _small("inception_resnet_v2", 96),
    "inception_v3": _small("inception_v3", 96),
    "inception_v4": _small("inception_v4", 96),
    "lcnetv2": _small("lcnetv2_small", 64),
    "levit": _small("levit_128s", 64, img_size=64),
    "lowformer": _small("lowformer_b0", 64),
    "mambaout": _small("test_mambaout", 64),
    "maxxvit": _small("test_maxvit", 64, img_size=64),
    "metaformer": _small("poolformerv2_s12", 64),
    "mlp_mixer": _small("gmlp_ti16_224", 64, img_size=64),
    "mobilenetv3": _small("mobilenetv3_small_050", 64),
    "mobilenetv5": _small("mobilenetv5_base", 64),
    "mobilevit": _small("mobilevit_xxs", 64),
    "mvitv2": _small("mvitv2_tiny", 64, img_size=64),
    "naflexvit": _small("naflexvit_base_patch16_gap", 64, depth=2, embed_dim=96, num_heads=3),
    "nasnet": _small("nasnetalarge", 64, stem_size=24, num_features=960),
    "nest": _small("nest_tiny", 64, img_size=64),
    "nextvit": _small("nextvit_small", 64),
    "nfnet": _small("test_nfnet", 64),
    "pit": _small("pit_ti_224", 64, img_size=64),
    "pnasnet": _small("pnasnet5large", 64),
    "pvt_v2": _small("pvt_v2_b0", 64),
    "qwen3_vit": _small("qwen3_vit_88m", 64, img_size=64, depth=2, embed_dim=96, num_heads=3),
    "rdnet": _small("rdnet_tiny", 64, num_blocks_list=[1] * 7),
    "regnet": _small("regnety_002", 64, drop_path_rate=0.2),
    "repghost": _small("repghostnet_050", 64),
    "repvit": _small("repvit_m1", 64),
    "res2net": _small("res2next50", 64, layers=(1, 1, 1, 1)),
    "resnest": _small("resnest14d", 64),
    "resnet": _small("test_resnet", 64),
    "resnetv2": _small("resnetv2_18", 64),
    "rexnet": _small("rexnet_100", 64),
    "selecsls": _small("selecsls42", 64),
    "senet": _small("legacy_seresnet18", 64),
    "sequencer": _small("sequencer2d_s", 64, img_size=64, layers=(1, 1, 1, 1)),
    "shvit": _small("shvit_s1", 64),
    "sknet": _small("skresnet18", 64),
    "starnet": _small("starnet_s050", 64),
    "swiftformer": _small("swiftformer_xs", 64, img_size=64),
    "swin_transformer": _small(
        "swin_tiny_patch4_window7_224",
        64,
        img_size=64,
        window_size=4,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        embed_dim=24,
    ),
    "swin_transformer_v2": _small(
        "swinv2_tiny_window8_256", 64, img_size=64, window_size=4, depths=(2, 2, 2), num_heads=(1, 2, 4), embed_dim=24
    ),
    "swin_transformer_v2_cr": _small(
        "swinv2_cr_tiny_224", 64, img_size=64, window_size=4, depths=(2, 2, 2), num_heads=(1, 2, 4), embed_dim=24
    ),
    "tiny_vit": _small("tiny_vit_5m_224", 64, depths=(1, 1, 2, 1)),
    "tnt": _small("tnt_s_patch16_224", 64, img_size=64, depth=2),
    "tresnet": _small("tresnet_m", 64, layers=(1, 1, 1, 1)),
    "twins": _small(
        "twins_svt_small",
        64,
        img_size=64,
        depths=(1, 1, 2, 1),
        embed_dims=(16, 32, 64, 128),
        num_heads=(1, 2, 2, 4),
    ),
    "vgg": _small("vgg11_bn", 64, mlp_ratio=1 / 64),
    "visformer": _small("visformer_tiny", 64, img_size=64),
    "vision_transformer": _small("test_vit", 64, img_size=64),
    "vision_transformer_hybrid": _small("vit_tiny_r_s16_p8_224", 64, img_size=64, depth=2),
    "vision_transformer_relpos": _small("test_vit_relpos", 64, img_size=64),
    "vision_transformer_sam": _small(
        "samvit_base_patch16_224",
        64,
        img_size=64,
        depth=3,
        embed_dim=96,
        num_heads=3,
        window_size=3,
        global_attn_indexes=(2,),
    ),
    "vitamin": _small("vitamin_small_224", 64, img_size=64, depth=2),
    "volo": _small("volo_d1_224", 64, img_size=64),
    "vovnet": _small("ese_vovnet19b_slim_dw", 64),
    "xception": _small("legacy_xception", 96),
    "xception_aligned": _small("xception41p", 64),
    "xcit": _small("xcit_nano_12_p8_224", 64, img_size=64),
}

# Families of which no entry can be binarized or run here, and why.
UNFIT: dict[str, str] = {}

# Their outputs are never negative, so that a sign after them is constant.
_RECTIFIERS = {"ReLU", "ReLU6", "StarReLU", "SquaredReLU"}
_CONVOLUTIONS = (nn.Conv2d, StdConv2d, ScaledStdConv2d)  # others pad in their own forward

_FEWEST_WEIGHTS = 8


class BiRealConv2d(MagnitudeAwareConv2d):
    """With the sign that stands before the convolution within it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.binary = ApproxSign()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.binary(x))


class BiRealLinear(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.binary = ApproxSign()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.binary(x), magnitude_aware(self.weight), self.bias)


METHODS = {"irnet": (IRConv2d, IRLinear), "bireal": (BiRealConv2d, BiRealLinear)}


def create(family: str) -> tuple[nn.Module, Tensor]:
    """The family's network with random weights, and a batch of images (4, 3, size, size)."""
    name, size, kwargs = FAMILIES[family]
    return timm.create_model(name, pretrained=False, num_classes=10, **kwargs), torch.randn(4, 3, size, size)


def settle(model: nn.Module) -> None:
    """Move every norm, bias and layer scale away from its initial value, as training does.

    Branches that start at zero would otherwise hand their layers nothing but zeros or rounding noise.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _inputs(model: nn.Module, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """What each of these layers is given in one forward pass, the first time; in the order of their calls."""
    seen: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        seen.setdefault(name, x)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name in names
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def _inner_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the layers that can be binarized but the first and the last, in the order of their first call.

    First are all that something without a gradient is fed to: the image, in as many scales or bands as the model takes.
    """
    kinds = (*_CONVOLUTIONS, nn.Linear)
    layers = {name: module for name, module in model.named_modules() if type(module) in kinds}
    inputs = _inputs(model, images, layers)
    heads = model.default_cfg.get("classifier") or ()
    last = {*([heads] if isinstance(heads, str) else heads), next(reversed(inputs))}
    # With few weights an output channel the output of a binary layer takes few values, and may be a code itself; where
    # all are the same, IR-Net divides by their spread.
    weights = {name: layers[name].weight.detach().flatten(1) for name in inputs}
    return [
        name
        for name, x in inputs.items()
        if x.requires_grad
        and name not in last
        and weights[name].shape[1] >= _FEWEST_WEIGHTS
        and weights[name].std(1).all()
    ]


def _as_binary(layer: nn.Module, method: str) -> nn.Module:
    """A binary layer with the weight and bias of `layer`, and as it moves over its input."""
    conv, linear = METHODS[method]
    if isinstance(layer, nn.Linear):
        binary = linear(layer.in_features, layer.out_features, layer.bias is not None)
    else:
        binary = conv(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
        )
    binary.weight, binary.bias = layer.weight, layer.bias
    return binary


def binarize(model: nn.Module, method: str, images: Tensor) -> list[str]:
    """Replace, in place, every convolution and linear layer between the first and the last by the method's.

    Rectifiers become PReLU, whose outputs have both signs. A layer stays as it is where there is next to nothing to
    binarize: inputs of one sign (after a softmax) or the same for every image (a learned token, a table of positions).

    Returns:
        the names of the binary layers.
    """
    settle(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ in _RECTIFIERS:
            model.set_submodule(name, nn.PReLU())
    layers = {name: model.get_submodule(name) for name in _inner_layers(model, images)}
    for name, layer in layers.items():
        model.set_submodule(name, _as_binary(layer, method))
    # The first of them only: behind a layer that is given a constant, others are too.
    while idle := _first_idle(model, images, layers):
        model.set_submodule(idle, layers.pop(idle))
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not module.inplace:  # which most entries leave at zero
            module.p = 0.1
    return list(layers)


def _first_idle(model: nn.Module, images: Tensor, names: Iterable[str]) -> str | None:
    """The first layer whose input has nearly the same signs for other images."""
    inputs, others = _inputs(model, images, names), _inputs(model, images.flip(0), names)
    return next((name for name, x in inputs.items() if _changed_signs(x, others[name]) < 0.02), None)


def _changed_signs(x: Tensor, other: Tensor) -> float:
    return float(((x >= 0) != (other >= 0)).float().mean())
