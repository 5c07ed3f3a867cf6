"""What a method is: one file with one declaration, found by its name, built from plain data."""

# ruff: noqa: F401
from luthier.registry.build import (
    build,
    format_errors,
    nested,
    nested_list,
    provides_of,
    requires_of,
    spec,
    submethods,
)
from luthier.registry.declare import (
    INTERNAL,
    Choices,
    Coverage,
    Internal,
    Range,
    architecture,
    compiler,
    coverage_of,
    declare,
    decoder,
    environment,
    estimator,
    evaluator,
    exporter,
    family,
    merger,
    objective,
    optimizer,
    plan,
    quantizer,
    reward,
    role,
    row_format,
    searcher,
    stage,
    transform,
    tuner,
)
from luthier.registry.describe import default_of, format_value, helps, page
from luthier.registry.discover import (
    Card,
    card,
    cards,
    classes,
    declared_words,
    did_you_mean,
    find,
    former_names,
    module_of,
    modules,
    names,
    package_of,
    plugins,
)
from luthier.registry.kinds import KINDS, Kind
from luthier.registry.metrics import COSTS, evaluator_of, former_metrics, metric, metrics
from luthier.registry.words import Artifact, Capability, Column, Metric
