"""Merging task vectors of one base into one."""

from tvjax.merge.ace import ace
from tvjax.merge.adapters import Adapter, merge_adapters, to_task_vector
from tvjax.merge.average import average
from tvjax.merge.breadcrumbs import breadcrumbs
from tvjax.merge.by_layer import by_layer
from tvjax.merge.core_space import core_space
from tvjax.merge.coverage import cover
from tvjax.merge.dare import dare
from tvjax.merge.della import della
from tvjax.merge.fisher import diagonal_fisher, fisher
from tvjax.merge.isotropic import iso_c, iso_cts
from tvjax.merge.karcher_mean import karcher_mean
from tvjax.merge.knots import knots, knots_adapters
from tvjax.merge.leaf_report import MergedLeaf, summary
from tvjax.merge.lines import lines
from tvjax.merge.model_stock import model_stock
from tvjax.merge.multi_slerp import multi_slerp
from tvjax.merge.nuslerp import nuslerp
from tvjax.merge.regmean import input_grams, regmean
from tvjax.merge.regmean_plus_plus import regmean_plus_plus
from tvjax.merge.sce import sce
from tvjax.merge.settings import ByDepth
from tvjax.merge.slerp import slerp
from tvjax.merge.svc import svc
from tvjax.merge.task_arithmetic import task_arithmetic
from tvjax.merge.ties import ties
from tvjax.merge.tsv import tsv_m
from tvjax.merge.views import matrix_views
from tvjax.merge.wudi import wudi

from tvjax.merge.registry import merges, register  # isort: skip - it names all of the above

__all__ = [
    "Adapter",
    "ByDepth",
    "MergedLeaf",
    "ace",
    "average",
    "breadcrumbs",
    "by_layer",
    "core_space",
    "cover",
    "dare",
    "della",
    "diagonal_fisher",
    "fisher",
    "input_grams",
    "iso_c",
    "iso_cts",
    "karcher_mean",
    "knots",
    "knots_adapters",
    "lines",
    "matrix_views",
    "merge_adapters",
    "merges",
    "model_stock",
    "multi_slerp",
    "nuslerp",
    "register",
    "regmean",
    "regmean_plus_plus",
    "sce",
    "slerp",
    "summary",
    "svc",
    "task_arithmetic",
    "ties",
    "to_task_vector",
    "tsv_m",
    "wudi",
]
