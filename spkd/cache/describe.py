"""Descriptions of a cache for people, from its card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from spkd.cache.codec import compressed
from spkd.cache.exchange.remote import ListedCache
from spkd.cache.folder import (
    COMPLETE,
    REJECTED,
    CommitRecord,
    CompletionRecord,
    commit_path,
    load_card,
    read_rejected,
)
from spkd.cache.plan import Plan
from spkd.corpus.view import ViewCard
from spkd.files.text import counted, format_bytes
from spkd.outputs.head import STORED
from spkd.outputs.target import Target
from spkd.outputs.teacher_card import TeacherCard

NUMBER = re.compile(r"\d+(\.\d+)?")
MOST_REASONS = 5  # kinds of reasons of rejections that are shown
LOST = {"cosine_mean": "", "cosine_min": "worst "}  # cosines of a card's errors, and the word before each


def growth(root: Path, fingerprint: str) -> str:
    """Phrase that says how much a cache has grown since it had a fingerprint; "" where it has not."""
    complete = CompletionRecord.there(root)
    if complete is None or (before := complete.utterances_at(fingerprint)) is None:
        return ""
    after = sum(part.utterances for part in complete.card.parts)
    return f"{root} has grown since ({before:,} -> {counted(after, 'utterance')})"


def describe(root: str | Path) -> str:
    """Text that describes a cache, complete or not.

    It has the teacher, licence, data, views, targets with their measured errors, bytes, authors and state.

    Raises:
        SpkdError: no cache there, or a damaged card, plan, record or list of rejections.
    """
    root = Path(root)
    card = load_card(root)
    plan = Plan.load(root, card)
    committed = {
        unit: CommitRecord.load(root, card, unit) for unit in range(plan.units) if commit_path(root, unit).is_file()
    }
    writers = Counter(commit.writer.get("host", "unknown") for commit in committed.values())
    rejected = read_rejected(root / REJECTED) if (root / REJECTED).is_file() else {}
    for unit, commit in committed.items():
        first = plan.unit(unit).start
        rejected |= {plan.view_name(first + number): reason for number, reason in commit.rejected.items()}
    complete = (root / COMPLETE).is_file()
    teacher = card.teacher
    hours = sum(part.hours for part in card.parts)
    rows = [
        ("teacher", f"{teacher.family} ({teacher.source}), weights {teacher.weights_sha256[:12]}{_library(teacher)}"),
        ("licence", teacher.licence),
        ("input", teacher.preprocessing),
        (
            "data",
            f"{counted(len(plan.utterances), 'utterance')}, {counted(len(plan.speakers), 'speaker')}, {hours:g} h",
        ),
        ("views", f"{len(plan.views)}: {views_in_words(card.views)}"),
        ("units", f"{len(committed)} of {plan.units} committed"),
        ("rejected", _reasons(rejected)),
    ]
    if len(card.parts) > 1:
        rows.append(("parts", "; ".join(f"{counted(p.utterances, 'utterance')}, {p.hours:g} h" for p in card.parts)))
    total = 0
    for target in card.targets:
        size = sum(p.stat().st_size for p in (root / target.name).glob("c/*/0"))
        total += size
        rows.append(("target", _target(target, size, card.errors.get(target.name))))
    if card.head:
        lost = _divergence(card.errors.get("logits", {}))
        follow = "logits are stored" if card.head.kind == STORED else f"logits follow{lost}"
        rows.append(("head", f"{card.head.kind}, {len(card.head.classes)} classes: {follow}"))
    made = card.made
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    rows += [
        ("bytes", format_bytes(total)),
        ("made", f"{made.at} by {made.by} on {made.host} with {versions}"),
        (
            "written by",
            ", ".join(f"{host} ({counted(count, 'unit')})" for host, count in writers.items()) or "nobody yet",
        ),
        ("cite", teacher.cite or "nothing named by the teacher"),
        ("fingerprint", CompletionRecord.load(root).fingerprint if complete else "none before it is complete"),
    ]
    return "\n".join([str(root), *(f"  {name:12} {text}" for name, text in rows)])


def _reasons(rejected: Mapping[str, str]) -> str:
    """Number of utterances and views that were rejected, and of those for each kind of reason, the most frequent first.

    Reasons are of one kind if they differ only in numbers or in what follows in brackets.
    """
    kinds = Counter(NUMBER.sub("N", re.split(r" \(|;", reason)[0]) for reason in rejected.values())
    shown = [f"{kind} ({count})" for kind, count in kinds.most_common(MOST_REASONS)]
    shown += [f"{len(kinds) - MOST_REASONS} other reasons"] if len(kinds) > MOST_REASONS else []
    return f"{len(rejected)}: {', '.join(shown)}" if rejected else "none"


def summary(cache: ListedCache) -> str:
    """One line that describes a cache in a list."""
    if cache.card is None:
        return f"{cache.url}: {cache.error}"
    card, size = cache.card, cache.bytes
    targets = " ".join(f"{target.name}:{target.codec}" for target in card.targets)
    state = "not complete" if size is None else format_bytes(size)
    views = f"{counted(card.num_views, 'view')} ({card.views.plan})"
    return f"{cache.url}  {cache.fingerprint[:12]}  {card.teacher.family}  {views}  {targets}  {state}"


def views_in_words(views: ViewCard) -> str:
    """The view plan, its speeds, formant factors and augmentation."""
    augmentation, parts = views.augmentation, [views.plan]
    if views.speeds != (1.0,):
        parts.append(f"speeds {', '.join(f'{s:g}' for s in views.speeds)}")
    if views.formants != (1.0,):
        parts.append(f"formants {', '.join(f'{f:g}' for f in views.formants)}")
    if views.vad is not None:
        parts.append(f"of speech alone ({views.vad})")
    if augmentation.noise:
        snr = " to ".join(f"{ratio:g}" for ratio in augmentation.snr)
        parts.append(f"noise with probability {augmentation.noise_prob:g} at {snr} dB")
    if augmentation.rir:
        parts.append(f"reverberation with probability {augmentation.rir_prob:g}")
    if augmentation.coders:
        parts.append(f"{', '.join(augmentation.coders)} with probability {augmentation.coder_prob:g}")
    return "; ".join(parts)


def _target(target: Target, size: int, error: dict[str, float] | None) -> str:
    rate = "per view" if target.rate is None else f"at {target.rate:g} Hz"
    text = f"{target.name}: {target.dim} x {target.codec} {rate}, {format_bytes(size)}"
    if error is not None:
        lost = [f"{word}{1 - error[name]:.1e}" for name, word in LOST.items() if name in error]
        text += f"; 1 - cosine {' '.join(lost)}{_divergence(error)}" if lost else _divergence(error)
    if compressed(target.codec):
        text += "; compressed, so read slower than a memory map"
    return text


def _divergence(error: dict[str, float]) -> str:
    parts = [f"{error[name]:.1e} at T={name.removeprefix('kl_t')}" for name in error if name.startswith("kl_t")]
    return f"; KL {', '.join(parts)}" if parts else ""


def _library(teacher: TeacherCard) -> str:
    """Phrase that names the library that ran the teacher; "" for torch."""
    return "" if teacher.library is None else f", run by {teacher.library}"
