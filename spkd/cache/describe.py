"""A cache's card as a person reads it."""

from __future__ import annotations

from pathlib import Path

from spkd.cache import card as cards
from spkd.cache.plan import Plan
from spkd.cache.target import Target
from spkd.cache.write import manifest_path


def describe(root: str | Path) -> str:
    """Teacher, data, views, targets, bytes and state of a cache, complete or not.

    Raises:
        SpkdError: no cache there, or a damaged card or plan.
    """
    root = Path(root)
    card, plan = cards.load(root), Plan.load(root)
    done = [unit for unit in range(plan.units) if manifest_path(root, unit).is_file()]
    teacher, views, data, made = card["teacher"], card["views"], card["manifest"], card["made"]
    augmentation = views["augmentation"]
    heard = [views["plan"]]
    if views["speeds"] != [1.0]:
        heard.append(f"speeds {', '.join(f'{s:g}' for s in views['speeds'])}")
    if augmentation["noise"]:
        heard.append(f"noise with probability {augmentation['noise_prob']:g} at {augmentation['snr']} dB")
    if augmentation["rir"]:
        heard.append(f"reverberation with probability {augmentation['rir_prob']:g}")
    lines = [
        f"{root}",
        f"  teacher      {teacher['family']} ({teacher['source']}), weights {teacher['weights_sha256'][:12]}",
        f"  licence      {teacher['licence']}",
        f"  hears        {teacher['preprocessing']}",
        f"  data         {data['utterances']} utterances, {data['speakers']} speakers, {data['hours']:g} h",
        f"  views        {len(plan.views)}: {'; '.join(heard)}",
        f"  units        {len(done)} of {plan.units} committed",
    ]
    for target in map(Target.from_card, card["targets"]):
        rate = "per view" if target.rate is None else f"at {target.rate:g} Hz"
        size = sum(p.stat().st_size for p in (root / target.name).glob("c/*/0"))
        lines.append(f"  target       {target.name}: {target.dim} x {target.dtype} {rate}, {size / 1e6:.1f} MB")
    if card["head"]:
        lines.append(f"  head         {card['head']['kind']}, {len(card['head']['classes'])} classes: logits are exact")
    lines += [
        f"  made         {made['at']} on {made['host']} with spkd {made['versions']['spkd']}",
        f"  fingerprint  {card['fingerprint']}",
    ]
    return "\n".join(lines)
