"""Sparse autoencoders, read from SAELens and sparsify folders with torch and safetensors alone.

    pre = (h - b_dec) W_enc + b_enc          (h itself where apply_b_dec_to_input is off)
    a   = pre * 1[gate]                      standard: pre > 0; JumpReLU: pre > threshold (and > 0);
                                             TopK: the k largest of the row (and > 0)
    h~  = a W_dec + b_dec

The paper's dense proxy (SMDA, arXiv 2606.29171, section 3) is another function of the same weights:
``encoder="relu"`` is ReLU(h W_enc + b_enc), without centring and without threshold. The gate is a
constant for autograd: d act / d pre is 1 where a feature is active and 0 elsewhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from taught.core.point import RESID_POST, Point
from taught.errors import UserError, reading
from taught.features.sae_config import SaeConfig, refuse_unknown, saelens_config, sparsify_config
from taught.run.files import read_json_mapping, read_tensors

Encoder = Literal["sae", "relu"]
ENCODERS = ("sae", "relu")
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_FROM_CONFIG = ("architecture", "k", "apply_b_dec_to_input", "rescale_by_decoder_norm", "point", "also", "hook")


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """Weights of a sparse autoencoder of what a model has at one point.

    Attributes
    ----------
    W_enc, b_enc, W_dec, b_dec : [D, F], [F], [F, D], [D]
    threshold : [F] or None; JumpReLU: a feature is active where its pre-activation is above it
    k : int or None; TopK: the number of features active per token, at most
    architecture : one of ARCHITECTURES
    apply_b_dec_to_input : whether ``b_dec`` is taken off the input
    rescale_by_decoder_norm : TopK of SAELens: pre-activations are multiplied by the norm of the
        feature's decoder row before the selection (and the decoder rows divided by it)
    point : where h is read
    hook : the name of that place in the file
    also : the same place by other names of the file, which hold for some models only
    provenance : where the weights are from and what the file says of their training (JSON values)
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    k: int | None
    architecture: str
    apply_b_dec_to_input: bool
    rescale_by_decoder_norm: bool
    point: Point
    hook: str
    also: tuple[Point, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.W_enc.ndim != 2 or not self.W_enc.numel():
            raise _bad_weights("W_enc", tuple(self.W_enc.shape), "[D, F]")
        width, features = self.W_enc.shape
        expected = {"b_enc": (features,), "W_dec": (features, width), "b_dec": (width,)}
        if self.threshold is not None:
            expected["threshold"] = (features,)
        for name, shape in expected.items():
            if (found := tuple(getattr(self, name).shape)) != shape:
                raise _bad_weights(name, found, str(list(shape)))
        if self.k is not None and not 0 < self.k <= features:
            raise _bad_weights("k", self.k, f"1 to {features}")

    @property
    def width(self) -> int:
        """D, the width of what is read."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        """F, the number of features."""
        return self.W_enc.shape[1]

    def encode(self, h: Tensor, ids: Tensor | Sequence[int] | None = None, encoder: Encoder = "sae") -> Tensor:
        """Feature activations.

        Parameters
        ----------
        h : [..., D]
        ids : int64 [d], optional, in the order of the columns of the result; None: all, in numeric order
        encoder : {"sae", "relu"}
            The autoencoder's own encoder, or the paper's dense proxy.

        Returns
        -------
        [..., d], differentiable in ``h`` with the gate at its value (d act / d pre is 1 or 0).

        Raises
        ------
        UserError
            An id that the autoencoder does not have, or an unknown encoder.

        Notes
        -----
        Costs D d multiply-adds a token; TopK needs all F features to know which are the k largest.
        """
        if encoder not in ENCODERS:
            raise UserError(
                "unknown encoder", value=encoder, rule="one of " + ", ".join(ENCODERS), fix="set sae.encoder"
            )
        chosen = None if ids is None else _checked_ids(ids, self.n_features).to(h.device)
        if encoder == "relu":
            return torch.relu(self._pre(h, chosen))
        x = h - self.b_dec if self.apply_b_dec_to_input else h
        if self.k is not None:
            pre = self._pre(x, None) * self._scale()
            gate = torch.zeros_like(pre).scatter(-1, pre.topk(self.k, dim=-1).indices, 1.0)
            acts = pre * (gate * (pre > 0))
            return acts if chosen is None else acts[..., chosen]
        pre = self._pre(x, chosen)
        threshold = pre.new_zeros(()) if self.threshold is None else self.threshold
        cut = threshold if chosen is None or threshold.ndim == 0 else threshold[chosen]
        return pre * ((pre > cut) & (pre > 0)).to(pre.dtype)

    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction [..., D] from the activations [..., F] of all features."""
        return (acts / self._scale()) @ self.W_dec + self.b_dec

    def decoder_rows(self, ids: Tensor | Sequence[int]) -> Tensor:
        """[d, D]: what each of these features adds to the reconstruction per unit of activation."""
        chosen = _checked_ids(ids, self.n_features).to(self.W_dec.device)
        rows = self.W_dec[chosen]
        return rows / rows.norm(dim=1, keepdim=True) if self.rescale_by_decoder_norm else rows

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> SparseAutoencoder:
        """Return the same autoencoder on another device or in another precision."""
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        return dataclasses.replace(self, **{name: t.to(device=device, dtype=dtype) for name, t in tensors.items()})

    def sha256(self) -> str:
        """Hex digest of everything that its features depend on.

        The names, shapes and bytes of the weights as they are held here (a device changes nothing,
        a precision may), and how the encoder uses them. Reads 28 MB in a tenth of a second.
        """
        how = (self.architecture, self.k, self.apply_b_dec_to_input, self.rescale_by_decoder_norm)
        digest = hashlib.sha256(f"{how} {self.point.block}\n".encode())
        if self.point.part != RESID_POST:
            digest.update(f"{self.point.part}\n".encode())
        for name in _TENSORS:
            if (tensor := getattr(self, name)) is not None:
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _pre(self, x: Tensor, ids: Tensor | None) -> Tensor:
        if ids is None:
            return x @ self.W_enc + self.b_enc
        return x @ self.W_enc[:, ids] + self.b_enc[ids]

    def _scale(self) -> Tensor:
        return self.W_dec.norm(dim=1) if self.rescale_by_decoder_norm else self.W_dec.new_ones(())


def _bad_weights(name: str, value: object, rule: str) -> UserError:
    return UserError(
        "the SAE's weights do not fit together",
        value=f"{name}: {value}",
        rule=rule,
        fix="check that the weights and cfg.json are of one SAE",
    )


def _checked_ids(ids: Tensor | Sequence[int], features: int) -> Tensor:
    chosen = torch.as_tensor(ids, dtype=torch.long)
    refuse_unknown(chosen[(chosen < 0) | (chosen >= features)].tolist(), features)
    return chosen


# --- reading --------------------------------------------------------------------------------------


def load_sae(
    path: str | Path, *, block: int | None = None, part: str | None = None, ignore: Collection[str] = ()
) -> SparseAutoencoder:
    """Read an autoencoder.

    Parameters
    ----------
    path
        A SAELens folder (``cfg.json``, ``sae_weights.safetensors``), a sparsify folder
        (``cfg.json``, ``sae.safetensors``), or ``release:sae_id`` of SAELens' public releases
        (needs the optional package sae-lens, and network).
    block, part : where it reads h (:class:`taught.core.point.Point`), as far as the file does not say
    ignore : keys of ``cfg.json`` that are not known here and that change nothing about the features

    Returns
    -------
    SparseAutoencoder
        float32, on the CPU.

    Raises
    ------
    UserError
        Nothing is there, or the configuration names something this reader does not compute.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and (named := re.fullmatch(r"([\w.\-]+):([\w./\-]+)", str(path))):
        return _load_release(named[1], named[2], block=block, part=part, ignore=ignore)
    rule = "a SAELens or sparsify folder, or release:sae_id"
    with reading("the SAE folder has no readable cfg.json", folder, rule=rule, fix="check sae.path"):
        config = read_json_mapping(folder / "cfg.json")
    names = ("sae_weights.safetensors", "sae.safetensors")
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        rule = "sae_weights.safetensors (SAELens) or sae.safetensors (sparsify)"
        raise UserError("the SAE folder holds no weights", value=str(folder), rule=rule, fix="check sae.path")
    fix = "copy or download it again"
    with reading("the SAE's weights cannot be read", folder / name, rule="a safetensors file", fix=fix):
        weights = read_tensors(folder / name)
    where: dict[str, Any] = {"block": block, "part": part, "folder": folder, "ignore": ignore}
    if name == names[0]:
        return _saelens(config, weights, {"folder": folder.name}, **where)
    weights = {name.replace("encoder.bias", "b_enc"): value for name, value in weights.items()}
    if (encoder := weights.pop("encoder.weight", None)) is not None:
        weights["W_enc"] = encoder.T.contiguous() if encoder.ndim == 2 else encoder
    return _build(sparsify_config(config, **where), weights, {"folder": folder.name, "format": "sparsify"})


def _saelens(
    config: Mapping[str, Any], weights: dict[str, Tensor], source: Mapping[str, Any], **where: Any
) -> SparseAutoencoder:
    provenance = {**source, "format": "saelens", "metadata": config.get("metadata") or {}}
    weights = dict(weights)
    scale = weights.pop("scaling_factor", None)  # some versions saved one that is not used
    if scale is not None and not bool((scale == 1).all()):
        raise _bad_weights("scaling_factor", "not all 1", "1 for every feature, or left out")
    return _build(saelens_config(config, **where), weights, provenance)


def _build(config: SaeConfig, weights: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> SparseAutoencoder:
    wanted = _TENSORS if config.architecture == "jumprelu" else _TENSORS[:-1]
    missing, extra = [name for name in wanted if name not in weights], sorted(set(weights) - set(wanted))
    if missing or extra:
        found = f"without: {', '.join(missing)}" if missing else f"also {', '.join(extra)}"
        raise _bad_weights("tensors", found, f"{', '.join(wanted)}, of {config.architecture}")
    for name, value in weights.items():
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            raise _bad_weights(name, f"{value.dtype}, or not finite", "finite floating point numbers")
    parts: dict[str, Any] = {name: weights[name].float() for name in wanted}
    parts |= {name: getattr(config, name) for name in _FROM_CONFIG}
    sae = SparseAutoencoder(**{"threshold": None, **parts}, provenance=provenance)
    for key, said, held in (("width", config.width, sae.width), ("features", config.features, sae.n_features)):
        if said is not None and said != held:
            raise _bad_weights(key, held, f"{said}, as cfg.json says")
    return sae


def _load_release(release: str, sae_id: str, **where: Any) -> SparseAutoencoder:
    """Read a public release through sae-lens; the weights are then handled as those of a folder."""
    try:
        sae_lens = importlib.import_module("sae_lens")
    except ImportError as error:
        what, rule = "reading a public release needs the package sae-lens", "an optional dependency"
        raise UserError(what, value=f"{release}:{sae_id}", rule=rule, fix="pip install 'taught[saelens]'") from error
    try:
        sae = sae_lens.SAE.from_pretrained(release=release, sae_id=sae_id, device="cpu")
    except Exception as error:  # sae-lens raises whatever its many loaders raise
        raise UserError(
            "sae-lens cannot load this release",
            value=f"{release}:{sae_id}: {error}",
            rule="a release and SAE id of SAELens",
            fix="see https://decoderesearch.github.io/SAELens for the names",
        ) from error
    sae = sae[0] if isinstance(sae, tuple) else sae
    weights = {name: value.detach() for name, value in sae.state_dict().items()}
    return _saelens(sae.cfg.to_dict(), weights, {"release": f"{release}:{sae_id}"}, **where)


# --- does it fit the model? ----------------------------------------------------------------------


@torch.no_grad()
def fraction_variance_unexplained(sae: SparseAutoencoder, h: Tensor) -> float:
    """sum |h - decode(encode(h))|^2 / sum |h - mean h|^2 over the tokens h [M, D].

    0: perfect; 1: no better than the mean. Summed in float64; nan with fewer than two different tokens.
    """
    error = (h - sae.decode(sae.encode(h))).double().pow(2).sum()
    total = (h.double() - h.double().mean(0)).pow(2).sum()
    return float(error / total) if total > 0 else float("nan")


def check_fit(sae: SparseAutoencoder, h: Tensor, limit: float = 0.9) -> float:
    """Fraction of variance unexplained on some h [M, D]; shows a wrong point or model.

    Raises
    ------
    UserError
        The widths differ, or the fraction is above ``limit`` (or not a number).
    """
    if h.shape[-1] != sae.width:
        raise UserError(
            "the SAE does not fit the model's width",
            value=f"SAE {sae.width}, model {h.shape[-1]}",
            rule="both have the width of the residual stream",
            fix="use an SAE that was trained on this model",
        )
    value = fraction_variance_unexplained(sae, h)
    if not value <= limit:
        raise UserError(
            "the SAE does not describe what is read",
            value=f"fraction of variance unexplained {value:.3g} at {sae.point}",
            rule=f"at most {limit:g} (sae.max_fvu)",
            fix="check the model, sae.block and sae.point: one block off shows here",
        )
    return value
