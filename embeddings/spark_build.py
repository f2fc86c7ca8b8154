"""Encoding a catalog on Spark's executors, where there are any; torchrun does the same without.

::

    from pyspark.sql import SparkSession
    from embeddings.spark_build import build_tables_on_spark

    build_tables_on_spark(SparkSession.builder.getOrCreate(), data, output, model)
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from embeddings.build import build_tables, encode_share
from embeddings.contents import Share
from embeddings.open_encoder import open_encoder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def build_tables_on_spark(
    spark: "SparkSession",
    data: Path,
    output: Path,
    model: Path | None = None,
    *,
    shares: int | None = None,
    max_broken_images: float = 0.1,
) -> None:
    """Do as `embeddings.build.build_tables` does, with the encoder on Spark's executors.

    The tables are those of one process, byte for byte, on machines that compute alike; a job that
    was stopped goes on with any number of shares. What the executors encoded counts as ``reused``
    in ``summary.json``.

    Args:
        spark: its executors need this project installed, and see the folders below under the
            names that the driver has for them.
        data: the dataset folder.
        output: the folder to write.
        model: the folder of an encoder; the packaged MiniLM if ``None``.
        shares: how many tasks; Spark's default parallelism if ``None``.
        max_broken_images: the largest share of broken images that is put up with.

    Raises:
        BadInputError: as `build_tables`; what breaks on an executor only is an error of Spark's.
    """
    context = spark.sparkContext
    shares = shares or context.defaultParallelism
    encode = partial(_encode, data.absolute(), output.absolute(), model and model.absolute())
    numbers = context.parallelize([(number, shares) for number in range(shares)], shares)
    numbers.foreach(encode)
    build_tables(data, output, open_encoder(model), max_broken_images=max_broken_images)


def _encode(data: Path, output: Path, model: Path | None, share: tuple[int, int]) -> None:
    """Make one share of the calls, on the processors of one task."""
    import torch
    from pyspark import TaskContext

    task = TaskContext.get()
    assert task is not None
    torch.set_num_threads(task.cpus())
    number, of = share
    encode_share(data, output, open_encoder(model), Share(number=number, of=of))
