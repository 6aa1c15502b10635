"The closed form in torch gives the numbers of numpy, whatever kernel was chosen, and its derivatives are right."
import numpy as np
import pytest
import torch

import biojepa as bj
from biojepa.closed_form import ClosedForm
from biojepa.closed_form_torch import TorchClosedForm
from biojepa.featurizers import FeatureTable
from biojepa.perturbations import Action
from biojepa.smoother import KernelSmoother, single_effects


@pytest.fixture(scope="module")
def fitted():
    cells = bj.prepare(bj.simulate(n_genes=40, n_perturbations=30, n_doubles=10, cells_per_perturbation=20, seed=1), n_genes=40)
    fold = bj.split(cells, "simulation", seed=0)
    table = FeatureTable.from_frame(bj.simulated_features(cells)).fit(list(fold.train))
    return fold, ClosedForm().fit(fold.cells(cells, "train"), table)


@pytest.mark.parametrize("linear", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("line", ["LINE0", "another"])
def test_same_numbers(fitted, linear, line):
    fold, form = fitted
    targets, beyond, _ = single_effects(form.actions, form.truth, form.genes)
    form.prior.smoother = KernelSmoother().fit(targets, beyond, form.table, (list(form.table.dims)[0], linear, 3.0))
    form.prior.weights = np.array([0.8, 0.4])
    new = {"another": form.control["LINE0"] * 1.2}
    actions = [Action.parse(n, dose=d) for n in [*fold.train, *fold.test] for d in (0.0, 0.4, 1.0, 3.0)]
    there = TorchClosedForm(form, line, new)
    expected = form.predict(actions, [line] * len(actions), new)[0]
    np.testing.assert_allclose(there(there.parts(actions)), expected, atol=1e-5)


def test_gradients_are_those_of_finite_differences(fitted):
    fold, form = fitted
    form.interaction_weights = np.array([0.5, 0.3])
    there = TorchClosedForm(form, "LINE0")
    parts = there.parts([Action.parse("+".join(fold.test[0].split("+")[:1] + [fold.train[0].split("+")[0]]))])
    x, dose = (t.clone().requires_grad_(True) for t in (parts.features, parts.dose * 0.7))
    assert torch.autograd.gradcheck(lambda x, d: there(parts, x, d), (x, dose))
