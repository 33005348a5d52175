"""Train and evaluate a classifier on scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels).

Runs by itself (`python train.py`) and as a Fray job on any backend (`fray run -p scikit-learn -- python train.py`).
The folds of the cross-validation are tasks: local threads in a local job, Ray's workers in a Ray job.
"""

import argparse
import json
import os
import time
from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fray import get_job_context


def make_model(regularization, iterations):
    """Return an untrained classifier."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=regularization, max_iter=iterations))


def evaluate_fold(images, labels, train_rows, test_rows, regularization, iterations):
    """Train on one part of the images and return the accuracy on the other."""
    model = make_model(regularization, iterations).fit(images[train_rows], labels[train_rows])
    return float(accuracy_score(labels[test_rows], model.predict(images[test_rows])))


def main():
    """Cross-validate, train on all but a held-out part, and write the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folds", type=int, default=5, help="parts of the cross-validation")
    parser.add_argument("--regularization", type=float, default=0.1, help="C of the logistic regression")
    parser.add_argument("--iterations", type=int, default=200, help="most steps of the solver")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    arguments = parser.parse_args()
    began = time.monotonic()

    images, labels = load_digits(return_X_y=True)
    print(f"{len(images)} images, {images.shape[1]} pixels each, {len(set(labels))} classes", flush=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=arguments.seed
    )

    context = get_job_context()
    print(f"evaluating {arguments.folds} folds as tasks of {type(context).__name__}", flush=True)
    splits = StratifiedKFold(arguments.folds, shuffle=True, random_state=arguments.seed).split(
        train_images, train_labels
    )
    settings = (arguments.regularization, arguments.iterations)
    shared = (context.put(train_images), context.put(train_labels))
    pending = [context.create_task(evaluate_fold, (*shared, *rows, *settings)) for rows in splits]
    order = list(pending)
    accuracies = [0.0] * len(order)
    while pending:
        done, pending = context.wait(pending)
        for ref in done:
            number = next(i for i, each in enumerate(order) if each is ref)
            accuracies[number] = context.get(ref)
            print(f"fold {number + 1}/{len(order)}: accuracy {accuracies[number]:.4f}", flush=True)

    model = make_model(*settings).fit(train_images, train_labels)
    accuracy = float(accuracy_score(test_labels, model.predict(test_images)))
    print(f"held-out accuracy {accuracy:.4f}", flush=True)

    metrics = {
        "fold_accuracies": [round(each, 4) for each in accuracies],
        "mean_fold_accuracy": round(sum(accuracies) / len(accuracies), 4),
        "held_out_accuracy": round(accuracy, 4),
        "seconds": round(time.monotonic() - began, 2),
    }
    directory = Path(os.environ.get("FRAY_OUTPUT_DIR", "outputs"))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"metrics written to {directory / 'metrics.json'}", flush=True)


if __name__ == "__main__":
    main()
