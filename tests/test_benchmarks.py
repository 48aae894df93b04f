"""The benchmarks measure what they say: each row is of its own template."""

from dataclasses import replace

from benchmarks.propagation import fill, propagated_dice
from semisam_o1.data.datasets import open_cohort
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore


def test_another_template_gives_other_labels(phantom_dir, tmp_path):
    cohort = open_cohort(phantom_dir, check=False)
    store = FeatureStore(tmp_path, mind(), 2.5)
    (template,), (other, case) = cohort.templates, cohort.pool
    fill(store, cohort, [template, other, case], 2.5)
    alone = replace(cohort, templates=(replace(other, split="template"),))
    first, second = (propagated_dice(store, c, [case], label_fusion=False) for c in (cohort, alone))
    assert first != second and min(*first, *second) > 0.3
