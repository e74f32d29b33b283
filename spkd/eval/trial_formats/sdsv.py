"""Lists of the SdSV and TdSV challenges."""

from spkd.eval.formats import LABELS, NamedColumns


class SdSV(NamedColumns):
    shape = "model-id evaluation-file-id, as line 1 names the columns"
    enrolment_names = ("model-id",)
    test_names = ("evaluation-file-id", "evaluation-file-ids", "test-file-id")
    label_names = ("trial-type", "label", "target")
    # A trial is a target where both the speaker and the phrase are correct.
    labels = {**LABELS, "tc": 1, "tw": 0, "ic": 0, "iw": 0}
