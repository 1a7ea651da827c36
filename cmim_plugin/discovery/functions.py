"""Names of torch functions by what they do to their arguments, without leading and trailing underscores."""

from __future__ import annotations

from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONVOLUTIONS = _names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d deform_conv2d")
#: Other products: each of their arguments may be an activation.
PRODUCTS = _names(
    "matmul rmatmul bmm mm mv dot addmm addmv addbmm baddbmm einsum inner tensordot bilinear chain_matmul sparse_mm "
    "grouped_mm linalg_matmul linalg_multi_dot linalg_vecdot scaled_dot_product_attention multi_head_attention_forward"
)
#: Products whose first argument is only added to the result.
WITH_ADDEND = _names("addmm addmv addbmm baddbmm")
RECURRENT = _names("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
#: Trained layers besides convolutions.
LAYERS = _names("linear") | RECURRENT
TRAINED = CONVOLUTIONS | PRODUCTS | LAYERS | _names("embedding embedding_bag")
SUMS = _names("add radd iadd sub rsub isub")
SCALINGS = _names("mul rmul imul multiply div divide true_divide truediv itruediv")
GATES = SCALINGS | _names("where")
JOINS = _names("cat concat concatenate stack hstack vstack")
#: Results with the same elements in the same order.
RESHAPES = _names("view view_as reshape reshape_as flatten unflatten squeeze unsqueeze ravel")
#: Views with permuted dimensions.
REORDERS = _names("permute transpose t T mT H mH swapaxes swapdims movedim moveaxis adjoint")
#: Views of some elements, or of repeated ones.
SELECTIONS = _names("getitem select unbind chunk split narrow expand expand_as unfold")
#: The values of the first argument or their negatives: moved, cast, selected, repeated, or with zeros among them.
MOVES = _names(
    "contiguous clone to type_as type float half bfloat16 double pad roll flip fliplr flipud rot90 neg negative "
    "dropout dropout1d dropout2d dropout3d feature_dropout masked_fill max_pool1d max_pool2d max_pool3d repeat tile "
    "repeat_interleave index_select gather take_along_dim fold pixel_shuffle pixel_unshuffle channel_shuffle"
).union(RESHAPES, REORDERS, SELECTIONS)
DETACHES = _names("detach data")
#: Rounding, comparisons and draws: few output values, whatever the input.
STEPS = _names(
    "sign sgn heaviside round floor ceil trunc signbit bernoulli bool gt ge lt le greater greater_equal less less_equal"
)
#: Over two elements, their output has two values, too, which is no binarization.
NORMS = _names("batch_norm instance_norm layer_norm group_norm normalize softmax")
#: The result has the shape of an argument, not its values.
SHAPE_ONLY = _names(
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like "
    "new_zeros new_ones new_full new_empty new_tensor"
)
RANDOM = _names(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli uniform normal random multinomial"
)


def plain_name(function: Any) -> str:
    """The name of a torch function, or of an attribute that is read or set, as it stands in the sets above."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return str(name).strip("_")


def writes(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a torch function writes into one of its arguments."""
    name = getattr(function, "__name__", "")
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return in_place or name == "__setitem__" or kwargs.get("out") is not None
