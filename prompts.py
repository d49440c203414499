"""Class prompts: what the classes of a data set are called, so that a text can stand for a class (zero-shot).

A class is a tuple of names, and a prompt is a name in a template. With an ensemble all names x all templates are embedded, averaged
and normalised again (evaluate.py); without it the first name stands alone. Adding a data set is adding an entry to DATASETS: the keys of
its classes are the labels as the data set itself writes them (folder, code or number). The default run measures itself with BUILT_IN.

All names and templates are ours. Idea: prompt ensembles as in CLIP, MI-Zero and CONCH (Lu et al. 2023, 2024).
"""

import json
from pathlib import Path

# The built-in world's facts; the first names in the form of a keyword, as CVTA saw them.
BUILT_IN = {
    "architecture": {
        "glands": ("well-formed gland", "crowded gland", "glands around open lumina"),
        "nests": ("solid nest", "rounded nest", "nests of cells"),
        "trabeculae": ("parallel trabecula", "branching trabecula", "trabeculae and cords"),
        "papillae": ("papillary frond", "slender papillary projection", "papillary structures"),
        "sheets": ("diffuse sheet", "solid sheet", "sheets without structure"),
    },
    "cytology": {
        "small round": ("small round dark nucleus", "small round blue cell", "uniform small round cells"),
        "vesicular": ("large vesicular nucleus", "vesicular nucleus", "vesicular chromatin"),
        "spindle": ("spindle cell", "elongated spindle nucleus", "slender spindle cells"),
        "signet ring": ("signet ring cell", "vacuolated signet ring cell", "signet ring cells with vacuoles"),
    },
    "diagnosis": {name: (name,) for name in (
        "prostatic adenocarcinoma", "cholangiocarcinoma", "nephroblastoma", "Krukenberg tumour", "carcinoid", "paraganglioma",
        "melanoma", "chordoma", "insulinoma", "hepatocellular carcinoma", "schwannoma", "linitis plastica", "ependymoma",
        "serous carcinoma", "mesothelioma", "pseudomyxoma peritonei", "Ewing sarcoma", "seminoma", "leiomyosarcoma", "liposarcoma")},
}
BUILT_IN_TEMPLATES = ("{}", "The image shows {}.", "This photomicrograph shows {}.", "A histopathology image of {}.",
                      "Microscopy reveals {}.", "The field displays {}.", "{} is seen.")

# For real tissue: as captions, teaching material and reports speak of it. No article, so that singular and plural both fit.
TEMPLATES = ("{}", "{}, H&E", "{}, H&E stain, histopathology", "an H&E stained image of {}", "an H&E image showing {}", "histopathology of {}",
             "a histopathology image of {}", "a histopathology slide showing {}", "a photomicrograph of {}", "a photomicrograph showing {}",
             "a microscopic field with {}", "a tissue section showing {}", "a tissue section with {}", "a biopsy showing {}",
             "a patch of {}", "microscopy reveals {}", "the findings are those of {}")

# Tile data sets first, then those of whole slides. The remark says what a patch is; the magnification decides which of the four levels reads it.
DATASETS = {
    "built-in-tissue": {                                  # the masks of the built-in world's slides (synthetic.py masks), in the order of their values
        "tumour": (*(names[0] for fact in ("architecture", "cytology") for names in BUILT_IN[fact].values()),),
        "stroma": ("stroma only", "connective tissue without tumour", "benign stroma with scattered fibroblasts"),
        "fat": ("mature adipose tissue", "fat cell with clear vacuole", "adipocyte"),
        "glass": ("blank background", "empty glass without tissue", "white background"),
    },
    "nct-crc": {                                          # colorectal tissue, 224 px at 0.5 um/px (20x); CRC-VAL-HE-7K is its test set
        "ADI": ("adipose tissue", "fat", "mature adipocytes", "fat cells with clear cytoplasm"),
        "BACK": ("background", "empty glass", "blank slide without tissue"),
        "DEB": ("debris", "necrotic debris", "necrosis", "cell debris"),
        "LYM": ("lymphocytes", "lymphoid tissue", "dense lymphocytic infiltrate", "lymphoid aggregate"),
        "MUC": ("mucus", "mucin", "extracellular mucin pools"),
        "MUS": ("smooth muscle", "muscularis propria", "bundles of smooth muscle"),
        "NORM": ("normal colon mucosa", "benign colonic mucosa", "regular crypts with goblet cells", "healthy colonic epithelium"),
        "STR": ("cancer-associated stroma", "desmoplastic stroma", "tumor stroma", "fibrous stroma with fibroblasts"),
        "TUM": ("colorectal adenocarcinoma epithelium", "colorectal adenocarcinoma", "malignant glands of the colon", "tumor epithelium"),
    },
    "pcam": {                                             # sentinel lymph nodes, 96 px at 10x (0.97 um/px); only the centre is labelled
        "0": ("normal lymph node", "benign lymphoid tissue", "lymph node without metastasis"),
        "1": ("lymph node metastasis", "metastatic breast carcinoma", "tumor cells in a lymph node", "metastatic carcinoma"),
    },
    "lc25000-lung": {                                     # 768 px, magnification not published; several patches are turned copies of one original
        "lung_n": ("benign lung tissue", "normal lung parenchyma", "alveoli with thin septa"),
        "lung_aca": ("lung adenocarcinoma", "adenocarcinoma of the lung", "malignant glands in the lung"),
        "lung_scc": ("lung squamous cell carcinoma", "squamous cell carcinoma of the lung", "keratinizing squamous carcinoma"),
    },
    "lc25000-colon": {
        "colon_n": ("benign colonic tissue", "normal colon mucosa", "regular colonic crypts"),
        "colon_aca": ("colon adenocarcinoma", "colorectal adenocarcinoma", "malignant glands of the colon"),
    },
    "mhist": {                                            # colorectal polyps, 224 px at 8x (scanned at 40x, made smaller)
        "HP": ("hyperplastic polyp", "benign hyperplastic polyp", "superficial serration of crypts", "polyp with straight crypt bases"),
        "SSA": ("sessile serrated adenoma", "sessile serrated lesion", "dilated serrated crypts", "boot-shaped crypt bases"),
    },
    "sicapv2": {                                          # prostate biopsies, 512 px at 10x
        "NC": ("benign prostate tissue", "non-cancerous prostate", "benign prostatic glands"),
        "G3": ("Gleason pattern 3", "well-formed infiltrating prostatic glands", "discrete small acini of prostate cancer"),
        "G4": ("Gleason pattern 4", "fused prostatic glands", "cribriform prostate cancer", "poorly formed malignant glands"),
        "G5": ("Gleason pattern 5", "sheets of prostate cancer cells", "single prostate cancer cells", "prostate cancer without glands"),
    },
    "bach": {                                             # breast, 2048 x 1536 px at 0.42 um/px (20x to 40x)
        "Normal": ("normal breast tissue", "terminal duct lobular units", "healthy breast lobules"),
        "Benign": ("benign breast lesion", "fibroadenoma", "usual ductal hyperplasia", "sclerosing adenosis"),
        "InSitu": ("breast carcinoma in situ", "ductal carcinoma in situ", "malignant cells confined to the ducts"),
        "Invasive": ("invasive breast carcinoma", "invasive ductal carcinoma", "carcinoma infiltrating the breast stroma"),
    },
    "wsss4luad": {                                        # lung adenocarcinoma, patches at 10x; a patch may hold several of the three
        "tumor": ("tumor epithelium", "lung adenocarcinoma cells", "malignant epithelium of the lung"),
        "stroma": ("tumor-associated stroma", "desmoplastic stroma", "fibrous stroma"),
        "normal": ("normal lung tissue", "alveolar tissue", "benign lung parenchyma"),
    },
    "digestpath": {                                       # colonoscopy biopsies, large regions at 20x
        "neg": ("benign colonic mucosa", "normal colon tissue", "colon biopsy without malignancy"),
        "pos": ("malignant colonic tissue", "colorectal carcinoma", "adenocarcinoma of the colon", "high-grade dysplasia of the colon"),
    },
    "databiox": {                                         # invasive ductal carcinoma of the breast by grade, photographed at 4x to 40x
        "1": ("grade 1 invasive ductal carcinoma", "well differentiated breast carcinoma", "low-grade breast cancer with tubules"),
        "2": ("grade 2 invasive ductal carcinoma", "moderately differentiated breast carcinoma"),
        "3": ("grade 3 invasive ductal carcinoma", "poorly differentiated breast carcinoma", "high-grade breast cancer with marked pleomorphism"),
    },
    "unitopatho": {                                       # colorectal polyps, 800 um and 7000 um fields scanned at 20x
        "NORM": ("normal colon tissue", "normal colonic mucosa", "regular colonic crypts"),
        "HP": ("hyperplastic polyp", "serrated crypts of a hyperplastic polyp"),
        "TA.LG": ("tubular adenoma with low-grade dysplasia", "low-grade tubular adenoma"),
        "TA.HG": ("tubular adenoma with high-grade dysplasia", "high-grade tubular adenoma"),
        "TVA.LG": ("tubulovillous adenoma with low-grade dysplasia", "low-grade tubulovillous adenoma"),
        "TVA.HG": ("tubulovillous adenoma with high-grade dysplasia", "high-grade tubulovillous adenoma"),
    },
    "camelyon16": {                                       # whole slides of sentinel lymph nodes, 40x (0.24 um/px)
        "normal": ("normal lymph node", "benign lymphoid tissue", "lymph node without metastasis"),
        "tumor": ("lymph node metastasis", "metastatic breast carcinoma", "tumor cells in a lymph node", "metastatic carcinoma"),
    },
    "rcc-dhmc": {                                         # whole slides of the kidney, 20x and 40x
        "Benign": ("benign kidney tissue", "normal renal parenchyma", "renal tubules and glomeruli"),
        "Chromophobe": ("chromophobe renal cell carcinoma", "chromophobe carcinoma with pale cells and perinuclear halos"),
        "Clearcell": ("clear cell renal cell carcinoma", "renal carcinoma with clear cytoplasm", "conventional renal cell carcinoma"),
        "Oncocytoma": ("renal oncocytoma", "oncocytoma", "nests of oncocytes with granular eosinophilic cytoplasm"),
        "Papillary": ("papillary renal cell carcinoma", "papillary carcinoma of the kidney", "papillary fronds with foamy macrophages"),
    },
    "nsclc": {                                            # whole slides of TCGA, 20x and 40x; CPTAC writes LSCC where TCGA has LUSC
        "LUAD": ("lung adenocarcinoma", "adenocarcinoma of the lung", "non-small cell carcinoma with glands", "lepidic or acinar growth in the lung"),
        "LUSC": ("lung squamous cell carcinoma", "squamous cell carcinoma of the lung", "keratinizing carcinoma of the lung", "keratin pearls in the lung"),
    },
    "bracs": {                                            # whole slides and regions of the breast, 40x
        "N": ("normal breast tissue", "healthy breast lobules"),
        "PB": ("pathological benign breast tissue", "fibrocystic change", "fibroadenoma"),
        "UDH": ("usual ductal hyperplasia", "benign ductal hyperplasia of the breast"),
        "FEA": ("flat epithelial atypia", "dilated acini with flat atypical epithelium"),
        "ADH": ("atypical ductal hyperplasia", "atypical proliferation of ducts"),
        "DCIS": ("ductal carcinoma in situ", "malignant cells confined to the ducts"),
        "IC": ("invasive breast carcinoma", "carcinoma infiltrating the breast stroma"),
    },
}


def find(spec, labels):
    """Names of the classes of a data set and the templates they go into: spec, a key of DATASETS, a JSON file {label: [names]}, or None: then the data set of DATASETS that has all
    `labels`. -> ({label as written in `labels`: tuple of names}, templates). ValueError where a label has no names."""
    key = spec
    if spec is None:
        fitting = [k for k, classes in DATASETS.items() if {c.lower() for c in labels} <= {c.lower() for c in classes}]
        if not labels or not fitting:
            raise ValueError(f"the labels {' '.join(sorted(labels)[:6])} belong to no data set of prompts.py: write {{label: [names]}} into a JSON file and give it as --classes")
        if all(label.isdigit() for label in labels):
            raise ValueError(f"the labels {' '.join(sorted(labels)[:6])} are numbers, which do not say what they mean: give --classes, one of {' '.join(DATASETS)} or a JSON file {{label: [names]}}")
        key = min(fitting, key=lambda k: len(DATASETS[k]))
        print(f"the labels are taken for those of {key}; if they are others, give --classes")
    if key in DATASETS:
        classes = DATASETS[key]
    else:
        try:
            classes = {c: (names,) if isinstance(names, str) else tuple(names) for c, names in json.loads(Path(key).read_text(encoding="utf-8")).items()}
            if not classes or not all(names and all(isinstance(n, str) and n for n in names) for names in classes.values()):
                raise ValueError("every class needs at least one name")
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise ValueError(f"--classes {key} is neither a JSON file {{label: [names]}} ({e}) nor one of {' '.join(DATASETS)}") from None
    spelled = {c.lower(): c for c in labels}
    if lacking := set(spelled) - {c.lower() for c in classes}:
        raise ValueError(f"the class {spelled[lacking.pop()]} has no names in {key}, which knows {' '.join(classes)}: add it")
    return {spelled.get(c.lower(), c): names for c, names in classes.items()}, BUILT_IN_TEMPLATES if str(key).startswith("built-in") else TEMPLATES


def class_prompts(names, templates, ensemble=True):
    """Prompts of one class, a list of str: its names x templates, or only its first name."""
    return [t.format(n) for n in names for t in templates] if ensemble else [names[0]]
