"""A ranker reads a release: vectors by item id, filtered neighbours, and batches for a training loop.

    python examples/read_release.py data/example/item_vectors

Needs ``marc-pipeline[reader]`` only: no torch, no pyspark, no airflow.
"""

import argparse

import numpy as np

from marc_pipeline.reader import open_release


def main() -> None:
    """Open the newest release, or that of a date, and print vectors, neighbours and batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="uri of the feature table, local or s3://")
    parser.add_argument("--ds", help="date of the snapshot, YYYY-MM-DD; default: the newest release")
    parser.add_argument("-k", type=int, default=5, help="neighbours per item (default: %(default)s)")
    given = parser.parse_args()
    with open_release(given.table, ds=given.ds) as release:
        print(release)
        ids = release.table(["item_id"])["item_id"].to_pylist()
        asked, seen = ids[:2], ids[2:4]
        vectors = release.vectors(asked)  # float32 [2, d], rows in the order asked
        print(f"vectors {vectors.shape}, norms {np.linalg.norm(vectors, axis=1).round(3).tolist()}")
        # Items that the user has seen are excluded; search still returns the true top k of the rest.
        names, scores = release.similar(asked, k=given.k, without=seen)
        for item, near, score in zip(asked, names, scores, strict=True):
            print(item, "->", ", ".join(f"{name} {value:.3f}" for name, value in zip(near, score, strict=True)))
        rows = sum(len(batch) for batch, _ in release.batches(1024, seed=1))  # every item once, shuffled
        print(f"{rows} rows in shuffled batches")


if __name__ == "__main__":
    main()
