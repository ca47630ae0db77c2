"""A model that is made once, on a runner, and used by many calls.

A classifier learns to read handwritten digits, and stays where it has learnt; calls with new images
are sent to it. It is scikit-learn's, as are the images.

    python examples/classify.py
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from sklearn.svm import SVC  # type: ignore[import-untyped]

from flame_dask import FlamePool, keep


def learn(images: np.ndarray, digits: np.ndarray) -> tuple[Any, int]:
    """Train a model. It stays on the runner; the number comes back."""
    model = SVC(gamma=0.001).fit(images, digits)
    return keep(model, concurrency=2), os.getpid()  # to predict changes nothing: two at a time


def read(model: SVC, images: np.ndarray) -> tuple[np.ndarray, int]:
    """Say which digits these are. The model is the object itself, wherever it is."""
    return model.predict(images), os.getpid()


def main() -> None:
    known, new, digits, solution = train_test_split(*load_digits(return_X_y=True), random_state=0)
    batches = np.array_split(new, 15)
    with FlamePool("classify", max=1, max_concurrency=4) as pool:
        model, process = pool.call(learn, known, digits, track_resources=True, timeout="2m")
        print(f"process {process} has learnt from {len(known)} images: {model}")
        with model:
            began = time.perf_counter()
            results = list(pool.map(read, itertools.repeat(model), batches))
            seconds = time.perf_counter() - began
            assert {where for _, where in results} == {process}
            print(f"it has read {len(new)} more in {len(batches)} calls, in {seconds:.2f} s")
            print(f"support vectors: {pool.call(lambda model: len(model.support_), model)}")
        print(f"released: {model}")
    answers = np.concatenate([answer for answer, _ in results])
    print(f"right: {(answers == solution).mean():.1%}")


if __name__ == "__main__":
    main()
