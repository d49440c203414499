"""pytest tests/test_prompts.py — the names of classes are complete, distinct and fit for a caption."""
import pytest

import prompts
import synthetic

# What the data sets themselves call their classes.
LABELS = {
    "nct-crc": "ADI BACK DEB LYM MUC MUS NORM STR TUM", "pcam": "0 1", "lc25000-lung": "lung_n lung_aca lung_scc", "lc25000-colon": "colon_n colon_aca",
    "mhist": "HP SSA", "sicapv2": "NC G3 G4 G5", "bach": "Normal Benign InSitu Invasive", "wsss4luad": "tumor stroma normal", "digestpath": "neg pos",
    "camelyon16": "normal tumor", "rcc-dhmc": "Benign Chromophobe Clearcell Oncocytoma Papillary", "nsclc": "LUAD LUSC", "databiox": "1 2 3",
    "unitopatho": "NORM HP TA.LG TA.HG TVA.LG TVA.HG", "bracs": "N PB UDH FEA ADH DCIS IC"}


def test_the_built_in_world_is_covered():
    assert tuple(prompts.BUILT_IN["architecture"]) == synthetic.ARCHITECTURES
    assert tuple(prompts.BUILT_IN["cytology"]) == synthetic.CYTOLOGIES
    assert tuple(prompts.BUILT_IN["diagnosis"]) == synthetic.ALL_DIAGNOSES


def test_public_data_sets_have_the_classes_they_are_known_to_have():
    assert {name: " ".join(classes) for name, classes in prompts.DATASETS.items() if name != "built-in-tissue"} == LABELS
    assert tuple(prompts.DATASETS["built-in-tissue"]) == synthetic.TISSUES


@pytest.mark.parametrize("name", prompts.DATASETS)
def test_names_of_a_data_set(name):
    """Several names a class, none shared by two classes (it would vote for both), plain words that a tokenizer knows."""
    names = [n for alternatives in prompts.DATASETS[name].values() for n in alternatives]
    assert len(set(map(str.lower, names))) == len(names)
    assert all(len(alternatives) >= 2 for alternatives in prompts.DATASETS[name].values())
    assert all(n.isascii() and n == n.strip() and "_" not in n and not n.endswith(".") and "{" not in n for n in names)


def test_an_ensemble_is_names_times_templates():
    assert prompts.class_prompts(("a", "b"), ("{}", "an {}")) == ["a", "an a", "b", "an b"]
    assert prompts.class_prompts(("a", "b"), ("an {}",), ensemble=False) == ["a"]
    for templates in (prompts.TEMPLATES, prompts.BUILT_IN_TEMPLATES):
        assert len(set(templates)) == len(templates) and all(t.count("{}") == 1 for t in templates)
