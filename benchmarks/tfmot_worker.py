"""Clusters a network's weights by TensorFlow Model Optimization while it trains; ``tfmot_peer.py`` runs this.

    python tfmot_worker.py JOB.json

The job has the layers of the network, its weights, the number of clusters, how to train and a folder, into which
CLUSTERS.zip and, for the weights that come out of it, CLUSTERS.safetensors are written. The network is built anew in
Keras and must answer as the dense network of torch does before it is trained.

The tool's own files do not get smaller by themselves; its guide zips them. CLUSTERS.zip is the smaller of two: the
weights that Keras saves, and the TFLite model, which has norms folded into convolutions and so more values in them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from safetensors.numpy import load_file, save_file

Arrays = dict[str, np.ndarray[Any, Any]]
CLOSE = 1e-3  # of the logits in Keras to those in torch
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def main() -> None:
    """Clusters, trains, strips and writes, and prints the seconds it took as JSON."""
    job = json.loads(Path(sys.argv[1]).read_text())
    for pool in (
        tf.config.threading.set_intra_op_parallelism_threads,
        tf.config.threading.set_inter_op_parallelism_threads,
    ):
        pool(1)
    tf.random.set_seed(0)
    batches, folder, clusters = load_file(job["batches"]), Path(job["folder"]), job["clusters"]
    images = batches["images"].transpose(0, 2, 3, 1)
    model = built(job["layers"], images.shape[1:])
    transplant(model, job["layers"], load_file(job["weights"]))
    gap = float(np.abs(model.predict(images[:256], verbose=0) - batches["logits"][:256]).max())
    if gap > CLOSE:
        raise ValueError(f"logits in Keras differ from those in torch by {gap}")
    print(f"logits in Keras differ from those in torch by at most {gap:.1e}", file=sys.stderr)
    start = time.process_time()
    stripped = clustered(model, images, batches["labels"], batches["logits"], job)
    write(stripped, folder / f"{clusters}.zip")
    seconds = time.process_time() - start
    save_file(weights_of(stripped, job["layers"]), folder / f"{clusters}.safetensors")
    print(json.dumps({clusters: seconds}))


def built(layers: list[dict[str, Any]], shape: tuple[int, ...]) -> Any:
    """Returns the network in Keras, without its weights."""
    tensors: dict[str, Any] = {}
    for layer in layers:
        inputs = [tensors[name] for name in layer["inputs"]]
        tensors[layer["id"]] = keras.Input(shape) if layer["kind"] == "Input" else applied(layer, inputs)
    (first,) = (tensors[layer["id"]] for layer in layers if layer["kind"] == "Input")
    return keras.Model(first, tensors[layers[-1]["id"]])


def applied(layer: dict[str, Any], inputs: list[Any]) -> Any:
    """Returns the output of a layer."""
    kind, name, x = layer["kind"], layer["id"], inputs[0]
    if kind == "Add":
        return keras.layers.Add(name=name)(inputs)
    if kind == "ReLU":
        return keras.layers.ReLU(name=name)(x)
    if kind == "AdaptiveAvgPool2d":
        return keras.layers.GlobalAveragePooling2D(name=name)(x)
    if kind == "Linear":
        return keras.layers.Dense(layer["out_features"], use_bias=layer["bias"], name=name)(x)
    if kind == "BatchNorm2d":
        return keras.layers.BatchNormalization(momentum=0.9, epsilon=layer["eps"], name=name)(x)
    if any(pair(layer["padding"])):  # symmetric, as in torch; after a ReLU zeros are the least, for MaxPool2d
        x = keras.layers.ZeroPadding2D(pair(layer["padding"]))(x)
    size, stride = pair(layer["kernel_size"]), pair(layer["stride"])
    if kind == "Conv2d":
        convolution = keras.layers.Conv2D(layer["out_channels"], size, stride, use_bias=layer["bias"], name=name)
        return convolution(x)
    pooling = {"MaxPool2d": keras.layers.MaxPooling2D, "AvgPool2d": keras.layers.AveragePooling2D}[kind]
    return pooling(size, stride, name=name)(x)


def pair(value: int | list[int]) -> tuple[int, int]:
    """Returns a size in both directions."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def parameters(model: Any, layers: list[dict[str, Any]]) -> list[tuple[Any, str, tuple[int, ...]]]:
    """Returns each variable, its name in torch, and the order of its axes in torch; () where they are the same."""
    found = []
    for layer in layers:
        if layer["kind"] not in ("Conv2d", "Linear", "BatchNorm2d"):
            continue
        for variable in model.get_layer(layer["id"]).weights:
            part = variable.name.rpartition("/")[2].partition(":")[0]
            axes = {"Conv2d": (3, 2, 0, 1), "Linear": (1, 0)}.get(layer["kind"], ()) if part == "kernel" else ()
            own = NORM[part] if layer["kind"] == "BatchNorm2d" else {"kernel": "weight", "bias": "bias"}[part]
            found.append((variable, f"{layer['name']}.{own}", axes))
    return found


def transplant(model: Any, layers: list[dict[str, Any]], weights: Arrays) -> None:
    """Sets the weights of the network in Keras to those of torch."""
    for variable, name, axes in parameters(model, layers):
        variable.assign(weights[name].transpose(np.argsort(axes)) if axes else weights[name])


def weights_of(model: Any, layers: list[dict[str, Any]]) -> Arrays:
    """Returns the weights under their names in torch."""
    return {
        name: np.ascontiguousarray(variable.numpy().transpose(axes) if axes else variable.numpy())
        for variable, name, axes in parameters(model, layers)
    }


def clustered(model: Any, images: Any, labels: Any, logits: Any, job: dict[str, Any]) -> Any:
    """Returns the network, trained with clusters in all its layers, without what clustering has put around them."""
    init = tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS
    shared = tfmot.clustering.keras.cluster_weights(
        model, number_of_clusters=job["clusters"], cluster_centroids_init=init
    )
    count = len(images) // job["epochs"]  # images of an epoch
    steps = job["epochs"] * -(-count // job["batch"])
    schedule = keras.optimizers.schedules.CosineDecay(job["lr"], steps)
    shared.compile(optimizer=keras.optimizers.Adam(schedule), loss=loss(job["distill"], job["temperature"]))
    targets = np.concatenate([np.eye(logits.shape[1], dtype=np.float32)[labels], logits], axis=1)
    for start in range(0, len(images), count):  # an epoch in its order
        chosen = slice(start, start + count)
        shared.fit(images[chosen], targets[chosen], batch_size=job["batch"], epochs=1, shuffle=False, verbose=0)
    return tfmot.clustering.keras.strip_clustering(shared)


def loss(share: float, temperature: float) -> Any:
    """Returns the loss: cross entropy, and a share of ``T^2 KL(teacher / T || student / T)``."""

    def total(targets: Any, output: Any) -> Any:
        classes = output.shape[1]
        task = tf.nn.softmax_cross_entropy_with_logits(targets[:, :classes], output)
        teacher = targets[:, classes:] / temperature
        student = tf.nn.log_softmax(output / temperature)
        divergence = tf.reduce_sum(tf.nn.softmax(teacher) * (tf.nn.log_softmax(teacher) - student), axis=1)
        return (1 - share) * task + share * temperature**2 * divergence

    return total


def write(model: Any, path: Path) -> None:
    """Writes the smaller of both zipped forms."""
    saved = path.with_suffix(".h5")
    model.save(saved, include_optimizer=False)
    lite = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    for content, name in ((saved.read_bytes(), "model.h5"), (lite, "model.tflite")):
        other = path.with_name(name + ".zip")
        with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            file.writestr(name, content)
        print(f"{name}: {other.stat().st_size} bytes zipped", file=sys.stderr)
        if not path.exists() or other.stat().st_size < path.stat().st_size:
            other.replace(path)


if __name__ == "__main__":
    main()
