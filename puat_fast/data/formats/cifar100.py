"""CIFAR-100, fine labels: cifar-100-python/{train,test,meta} or cifar-100-python.tar.gz."""

from __future__ import annotations

from pathlib import Path

from puat_fast.data.formats import cifar
from puat_fast.data.formats.base import Dataset
from puat_fast.data.formats.places import Note

_CLASS_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

LAYOUT = cifar.Layout(
    name="cifar100",
    title="CIFAR-100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train=("train",),
    test=("test",),
    meta="meta",
    label_key=b"fine_labels",
    names_key=b"fine_label_names",
    class_names=tuple(_CLASS_NAMES.split()),
)


def load(data_dir: str | Path | None, note: Note | None = None) -> Dataset:
    """50000 training and 10000 test images (fewer where the files hold fewer), 100 classes. Raises DataError."""
    return cifar.load(LAYOUT, data_dir, note)
