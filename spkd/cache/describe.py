"""A cache's card as a person reads it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from spkd.cache import card as cards
from spkd.cache import codec as codecs
from spkd.cache.head import STORED
from spkd.cache.plan import Plan
from spkd.cache.target import Target
from spkd.cache.write import manifest_path
from spkd.files import read_json


def describe(root: str | Path) -> str:
    """Teacher, licence, data, views, targets with their measured errors, bytes, authors and state of a cache,
    complete or not.

    Raises:
        SpkdError: no cache there, or a damaged card or plan.
    """
    root = Path(root)
    card = cards.load(root)
    plan = Plan.load(root, len(card["parts"]))
    manifests = [manifest_path(root, unit) for unit in range(plan.units) if manifest_path(root, unit).is_file()]
    writers = Counter(read_json(path)["writer"]["host"] for path in manifests)
    teacher, made, parts = card["teacher"], card["made"], card["parts"]
    hours = sum(part["hours"] for part in parts)
    rows = [
        ("teacher", f"{teacher['family']} ({teacher['source']}), weights {teacher['weights_sha256'][:12]}"),
        ("licence", teacher["licence"]),
        ("hears", teacher["preprocessing"]),
        ("data", f"{len(plan.utterances)} utterances, {len(plan.speakers)} speakers, {hours:g} h"),
        ("views", f"{len(plan.views)}: {_heard(card['views'])}"),
        ("units", f"{len(manifests)} of {plan.units} committed"),
    ]
    if len(parts) > 1:
        rows.append(("parts", "; ".join(f"{p['utterances']} utterances, {p['hours']:g} h" for p in parts)))
    total = 0
    for target in map(Target.from_card, card["targets"]):
        size = sum(p.stat().st_size for p in (root / target.name).glob("c/*/0"))
        total += size
        rows.append(("target", _target(target, size, card["errors"].get(target.name))))
    if card["head"]:
        lost = _divergence(card["errors"].get("logits", {}))
        follow = "logits are stored" if card["head"]["kind"] == STORED else f"logits follow{lost}"
        rows.append(("head", f"{card['head']['kind']}, {len(card['head']['classes'])} classes: {follow}"))
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    rows += [
        ("bytes", amount(total)),
        ("made", f"{made['at']} by {made['by']} on {made['host']} with {versions}"),
        ("written by", ", ".join(f"{host} ({count} units)" for host, count in writers.items()) or "nobody yet"),
        ("cite", teacher.get("cite") or "nothing named by the teacher"),
        ("fingerprint", card["fingerprint"]),
    ]
    return "\n".join([str(root), *(f"  {name:12} {text}" for name, text in rows)])


def amount(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def _heard(views: dict[str, Any]) -> str:
    augmentation, heard = views["augmentation"], [views["plan"]]
    if views["speeds"] != [1.0]:
        heard.append(f"speeds {', '.join(f'{s:g}' for s in views['speeds'])}")
    if augmentation["noise"]:
        heard.append(f"noise with probability {augmentation['noise_prob']:g} at {augmentation['snr']} dB")
    if augmentation["rir"]:
        heard.append(f"reverberation with probability {augmentation['rir_prob']:g}")
    return "; ".join(heard)


def _target(target: Target, size: int, error: dict[str, float] | None) -> str:
    rate = "per view" if target.rate is None else f"at {target.rate:g} Hz"
    text = f"{target.name}: {target.dim} x {target.codec} {rate}, {amount(size)}"
    if error is not None:
        text += f"; 1 - cosine {1 - error['cosine_mean']:.1e} (worst {1 - error['cosine_min']:.1e}){_divergence(error)}"
    if codecs.compressed(target.codec):
        text += "; compressed, so read slower than a memory map"
    return text


def _divergence(error: dict[str, float]) -> str:
    parts = [f"{error[name]:.1e} at T={name.removeprefix('kl_t')}" for name in error if name.startswith("kl_t")]
    return f"; KL {', '.join(parts)}" if parts else ""
