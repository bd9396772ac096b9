"""sgd_ema_ and adam_: the weight update of a whole network, with its moving average and bf16 copy, in one launch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puat_fast.ops._layout import capsules, check_dtype, dense_alike, stream_of
from puat_fast.ops._library import Impl, register, takes_reference
from puat_fast.ops._native import _C


def sgd_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor],
    emas: Sequence[Tensor] | None = None,
    copies: Sequence[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decays: Sequence[float],
    ema_decay: float | Tensor | None = None,
    nesterov: bool = True,
    impl: Impl = "auto",
) -> None:
    """One step of SGD with momentum for all tensors of a network, which its moving average follows.

        g      <- grad + weight_decay param
        buffer <- momentum buffer + g                       (zeros before the first step)
        param  <- param - lr (g + momentum buffer)          (without nesterov: lr buffer)
        ema    <- ema_decay ema + (1 - ema_decay) param     (ema_decay 0 copies: no NaN of ema survives)
        copy   <- param, rounded

    Source: Sutskever et al. 2013 (ICML), in the form of torch's SGD; the average: Tarvainen & Valpola 2017
    (arXiv:1703.01780), section 2.

    Entry i of each list belongs to params[i]: same shape, dtype and device. Where grads[i] is None the whole of entry
    i is left alone. What is not finite gets no special treatment, except for ema_decay 0.

    float32 tensors that are dense and, within an entry, share one layout (contiguous, channels_last, any permutation)
    take the compiled kernel, up to 128 entries in one launch; its results equal the reference's bit for bit, on CPU and
    GPU. Other entries (a gradient in another order than its weight, slices) and float64 take the reference.

    Args:
        params: float32 or float64, any shapes; written.
        grads: likewise; only read.
        momentum_buffers: likewise; written.
        emas: likewise; written.
        copies: bfloat16, None for what needs no copy; written.
        lr: finite, >= 0. This, momentum and ema_decay: a float, or, where a captured graph shall see them change, a
            0-d tensor like params. Either is rounded to their dtype first.
        momentum: in [0, 1].
        weight_decays: one for each of params; finite, >= 0.
        ema_decay: in [0, 1]; needed with emas.
        nesterov: see above.
        impl: "auto", or "reference" for plain torch.

    Raises:
        ValueError: an argument outside of the above, named; params partly overlap what belongs to them; impl unknown.
    """
    _check_entries(params, grads, copies, momentum_buffers=momentum_buffers, emas=emas)
    _check_numbers("weight_decays", weight_decays, len(params))
    if emas and ema_decay is None:
        raise ValueError("ema_decay: expected a number or a tensor, as emas are given, got None")
    reference = takes_reference(impl)
    columns = _with_gradient(params, grads, momentum_buffers, emas, copies, weight_decays)
    if not columns[0]:
        return
    like = params[0]
    numbers = (
        _number("lr", lr, like),
        _number("momentum", momentum, like, 1),
        _number("ema_decay", 1.0 if ema_decay is None else ema_decay, like, 1),
    )
    with torch.no_grad():
        if reference:
            _sgd_reference(_rows(*columns), *numbers, nesterov)
        else:
            torch.ops.puat_fast.sgd_ema_(*columns, *numbers, nesterov)


def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float = 1e-8,
    impl: Impl = "auto",
) -> None:
    """One step of Adam, without weight decay, for all tensors of a network.

        step       <- step + 1
        exp_avg    <- beta1 exp_avg + (1 - beta1) grad
        exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) grad^2
        param      <- param - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)
        copy       <- param, rounded

    Source: Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1, in the form of torch's Adam.

    All as for `sgd_ema_`, except that the kernel equals the reference to rounding (torch's square root on the CPU is
    not the nearest float). The corrections 1 - beta^step are computed in float64.

    Args:
        exp_avgs: like params; zeros before the first step; written.
        exp_avg_sqs: likewise.
        steps: 0-d float32 tensors on the device of params, each of its own: the steps done so far; written.
        lr: a float, or a 0-d tensor like params; finite, >= 0.
        betas: each in [0, 1).
        eps: finite, >= 0.

    Raises:
        ValueError: as `sgd_ema_`.
    """
    _check_entries(params, grads, copies, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _check_count("steps", steps, len(params))
    for i, step in enumerate(steps):
        _check_scalar(f"steps[{i}]", step, torch.float32, params[i].device)
    _check_numbers("betas", betas, 2)
    for i, beta in enumerate(betas):
        if beta >= 1:
            raise ValueError(f"betas[{i}]: expected a number below 1, got {beta}")
    _check_numbers("eps", [eps], 1)
    reference = takes_reference(impl)
    columns = _with_gradient(params, grads, exp_avgs, exp_avg_sqs, copies, steps)
    if not columns[0]:
        return
    rate = _number("lr", lr, params[0])
    with torch.no_grad():
        if reference:
            torch._foreach_add_(columns[-1], 1)
            _adam_reference(_rows(*columns), rate, *betas, eps)
        else:
            torch.ops.puat_fast.adam_(*columns, rate, *betas, eps)


# -- plain torch ----------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """Entry i of each list."""

    param: Tensor
    grad: Tensor
    first: Tensor  # momentum buffer, or exp_avg
    second: Tensor | None  # ema, or exp_avg_sq
    copy: Tensor | None
    own: Any  # weight decay, or step


def _sgd_reference(rows: Iterable[_Row], lr: Tensor, momentum: Tensor, ema_decay: Tensor, nesterov: bool) -> None:
    for param, grad, buffer, ema, copy, weight_decay in rows:
        decayed = grad + weight_decay * param
        buffer.copy_(momentum * buffer + decayed)
        param.sub_(lr * (decayed + momentum * buffer if nesterov else buffer))
        if ema is not None:
            copied = ema_decay * torch.ones_like(param) == 0  # on the device, where ema_decay need not be
            ema.copy_(torch.where(copied, param, ema_decay * ema + (1 - ema_decay) * param))
        if copy is not None:
            copy.copy_(param)


def _adam_reference(rows: Iterable[_Row], lr: Tensor, beta1: float, beta2: float, eps: float) -> None:
    for param, grad, exp_avg, exp_avg_sq, copy, step in rows:
        assert exp_avg_sq is not None
        correction1, correction2 = _correction(beta1, step), _correction(beta2, step)
        exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * grad)
        exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * grad * grad)
        step_size, root = (lr.double() / correction1).to(param.dtype), correction2.sqrt().to(param.dtype)
        param.sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / root + eps))
        if copy is not None:
            copy.copy_(param)


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step."""
    return -torch.expm1(step.double() * (math.log(beta) if beta > 0 else -math.inf))


# -- arguments ------------------------------------------------------------------------------------------------------


def _check_entries(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    copies: Sequence[Tensor | None] | None,
    **states: Sequence[Tensor] | None,
) -> None:
    for i, param in enumerate(params):
        check_dtype(f"params[{i}]", param, torch.float32, torch.float64)
    lists: dict[str, Sequence[Tensor | None] | None] = {"params": params, "grads": grads, "copies": copies, **states}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        _check_count(name, tensors, len(params))
        dtype = torch.bfloat16 if name == "copies" else params[0].dtype if params else None
        for i, (t, param) in enumerate(zip(tensors, params, strict=True)):
            if t is not None and (t.shape != param.shape or t.dtype != dtype or t.device != params[0].device):
                raise ValueError(
                    f"{name}[{i}]: expected {dtype}, shape {tuple(param.shape)}, on {params[0].device} (as params), "
                    f"got {t.dtype}, shape {tuple(t.shape)}, on {t.device}"
                )


def _check_count(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} entries, got {len(values)}")


def _check_numbers(name: str, values: Sequence[float], count: int) -> None:
    _check_count(name, values, count)
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected finite numbers >= 0, got {value}")


def _check_scalar(name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if t.dim() != 0 or t.dtype != dtype or t.device != device:
        raise ValueError(
            f"{name}: expected a 0-d tensor, {dtype}, on {device}, got {t.dim()}-d, {t.dtype}, on {t.device}"
        )


def _number(name: str, value: float | Tensor, like: Tensor, highest: float = math.inf) -> Tensor:
    """The value as a 0-d tensor; a float stays in host memory, and its value goes along with the launch."""
    if isinstance(value, Tensor):
        _check_scalar(name, value, like.dtype, like.device)
        return value
    if not (math.isfinite(value) and 0 <= value <= highest):
        raise ValueError(f"{name}: expected a finite number >= 0 and <= {highest}, got {value}")
    return torch.tensor(value, dtype=like.dtype, device="cpu")


# -- the registered ops ---------------------------------------------------------------------------------------------
# They take lists, `_Columns`: params, grads, first, second (or none), copies (of some), the positions that these belong
# to, own. A schema knows no list of tensors-or-None that is written to.

_Columns = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int], list[Any]]


def _with_gradient(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    first: Sequence[Tensor],
    second: Sequence[Tensor] | None,
    copies: Sequence[Tensor | None] | None,
    own: Sequence[Any],
) -> _Columns:
    """The entries that have a gradient."""
    kept = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
    given = [(k, copies[i]) for k, (i, _) in enumerate(kept)] if copies else []
    pairs = [(k, copy) for k, copy in given if copy is not None]
    return (
        [params[i] for i, _ in kept],
        [grad for _, grad in kept],
        [first[i] for i, _ in kept],
        [second[i] for i, _ in kept] if second else [],
        [copy for _, copy in pairs],
        [k for k, _ in pairs],
        [own[i] for i, _ in kept],
    )


def _rows(
    params: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    copies: list[Tensor],
    copied: list[int],
    own: list[Any],
) -> list[_Row]:
    none: list[None] = [None] * len(params)
    copy_of = dict(zip(copied, copies, strict=True))
    all_copies = [copy_of.get(i) for i in range(len(params))]
    return [_Row(*row) for row in zip(params, grads, first, second or none, all_copies, own, strict=True)]


def _split(rows: list[_Row]) -> tuple[list[_Row], list[_Row]]:
    """(those for the kernel, those for the reference)."""
    like = rows[0].param
    if like.dtype != torch.float32 or (like.is_cuda and not hasattr(_C, "sgd_ema_cuda")):
        return [], rows
    for_kernel, odd = list[_Row](), list[_Row]()
    for row in rows:
        (for_kernel if _one_layout([t for t in row[:5] if t is not None]) else odd).append(row)
    return for_kernel, odd


def _one_layout(tensors: list[Tensor]) -> bool:
    for layout in (torch.contiguous_format, torch.channels_last):  # dense_alike says the same, ten times slower
        if all(t.is_contiguous(memory_format=layout) for t in tensors):
            return True
    return dense_alike(*tensors)


def _launch(op: str, rows: list[_Row], own: list[Any], *numbers: Any) -> None:
    param, grad, first, second, copy, _ = zip(*rows, strict=True)
    seconds = capsules(*second) if second[0] is not None else []
    copies = [None if c is None else capsules(c)[0] for c in copy]
    streams = (capsules(*param), capsules(*grad), capsules(*first), seconds, copies)
    if param[0].is_cuda:
        getattr(_C, f"{op}_cuda")(*streams, own, *numbers, stream_of(param[0]))
    else:
        getattr(_C, f"{op}_cpu")(*streams, own, *numbers, torch.get_num_threads())
    written = [t for column in (param, first, second, copy) for t in column if t is not None]
    # autograd must see that what it saved of them is gone
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def _sgd_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    copied: list[int],
    weight_decays: list[float],
    lr: Tensor,
    momentum: Tensor,
    ema_decay: Tensor,
    nesterov: bool,
) -> None:
    rows, odd = _split(_rows(params, grads, momentum_buffers, emas, copies, copied, weight_decays))
    if rows:
        _launch("sgd_ema", rows, [row.own for row in rows], *capsules(lr, momentum, ema_decay), nesterov)
    _sgd_reference(odd, lr, momentum, ema_decay, nesterov)


def _adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    copied: list[int],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    torch._foreach_add_(steps, 1)
    rows, odd = _split(_rows(params, grads, exp_avgs, exp_avg_sqs, copies, copied, steps))
    if rows:
        _launch("adam", rows, capsules(*(row.own for row in rows)), *capsules(lr), beta1, beta2, eps)
    _adam_reference(odd, lr, beta1, beta2, eps)


def _fake(*arguments: Any) -> None:
    pass


register(
    "sgd_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] emas, "
    "Tensor(d!)[] copies, int[] copied, float[] weight_decays, Tensor lr, Tensor momentum, Tensor ema_decay, "
    "bool nesterov) -> ()",
    cpu=_sgd_ema_,
    cuda=_sgd_ema_,
    fake=_fake,
)
register(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, "
    "int[] copied, Tensor(e!)[] steps, Tensor lr, float beta1, float beta2, float eps) -> ()",
    cpu=_adam_,
    cuda=_adam_,
    fake=_fake,
)
