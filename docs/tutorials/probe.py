"""Train a probe on frozen features: python docs/tutorials/probe.py MODEL TRAIN_FOLDER TEST_FOLDER"""

import sys

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.probing.features import Feature, FeatureCondition, extract
from ebt_vision.probing.load import load_extractor

model, train_folder, test_folder = sys.argv[1:]


def features_of(name: str, folder: str) -> tuple[torch.Tensor, list[int]]:
    """Return mean tokens of the second-to-last block, (N, D), of clean images, and classes."""
    extractor = load_extractor(name)
    layer = extractor.blocks[-2]
    images = load_image_set(DataConfig(path=folder, img_size=extractor.img_size))
    feature = Feature(condition=FeatureCondition(), layer=layer, pool="mean")
    parts = []
    for start in range(0, len(images), 64):
        indices = range(start, min(start + 64, len(images)))
        parts.append(extract(extractor, images.images(indices), indices, [feature])[feature])
    return torch.cat(parts), images.labels


for name in (model, f"random:{model}"):
    x, y = features_of(name, train_folder)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y)
    accuracy = classifier.score(*features_of(name, test_folder))
    print(f"{name}: {100 * accuracy:.1f} % of the test images, {len(set(y))} classes")
