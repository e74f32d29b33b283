"""Tables of NIST SRE whose line 1 names the columns, with or without labels (key)."""

from spkd.eval.formats import NamedColumns


class NIST(NamedColumns):
    shape = "modelid segmentid [side] [targettype], as line 1 names the columns"
    enrolment_names = ("modelid", "model", "model_id")
    test_names = ("segmentid", "segment", "segment_id", "test_id", "testid")
    side_names = ("side", "channel")
    label_names = ("targettype", "target", "trial_status", "target/nontarget", "label", "same", "is_target")
