"""Simulated transmission of speech: the telephone band, and coders of speech and music, through libsndfile."""

from __future__ import annotations

import io

import numpy as np
import soundfile

from spkd.corpus.audio import SAMPLE_RATE, resample
from spkd.errors import SpkdError

TELEPHONE_RATE = 8_000  # Hz
TELEPHONE_BAND = (300.0, 3400.0)  # Hz (ITU-T G.712)
# Container, coding and, where it has one, libsndfile's compression level: about 30 to 40 kbit/s.
CODERS: dict[str, tuple[str, str, float | None]] = {
    "g711": ("WAV", "ULAW", None),
    "gsm": ("WAV", "GSM610", None),
    "opus": ("OGG", "OPUS", 0.9),
    "mp3": ("MP3", "MPEG_LAYER_III", 0.5),
    "vorbis": ("OGG", "VORBIS", 0.9),
}
NARROW = ("g711", "gsm")


def transmit(wave: np.ndarray, coder: str) -> np.ndarray:
    """Encode and decode a waveform.

    g711 (mu-law, ITU-T G.711) and gsm (GSM 06.10) are limited to the telephone band, at 8 kHz. opus, mp3 and vorbis
    work at 16 kHz.

    Args:
        wave: (samples,), float32, 16 kHz.
        coder: a name in CODERS.
    Returns:
        (samples,), float32, 16 kHz.
    Raises:
        SpkdError: this libsndfile lacks the coder.
    """
    from scipy.signal import butter, sosfilt  # here, because the import takes a second

    container, coding, level = CODERS[coder]
    rate, sent = SAMPLE_RATE, wave
    if coder in NARROW:
        rate = TELEPHONE_RATE
        band = butter(4, TELEPHONE_BAND, "bandpass", fs=rate, output="sos")
        sent = sosfilt(band, resample(wave, SAMPLE_RATE, rate)).astype(np.float32)
    file = io.BytesIO()
    options = {} if level is None else {"compression_level": level}
    # Scaled down where needed, because encoders clip at full scale.
    peak = max(float(np.abs(sent).max(initial=0.0)), 1.0)
    try:
        soundfile.write(file, sent / peak, rate, format=container, subtype=coding, **options)
        file.seek(0)
        received, _ = soundfile.read(file, dtype="float32")
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise SpkdError(f"view.coders: {coder}: not in this libsndfile ({error})") from error
    received = resample(np.ascontiguousarray(received * np.float32(peak)), rate, SAMPLE_RATE)
    return np.pad(received, (0, max(len(wave) - len(received), 0)))[: len(wave)].astype(np.float32)
