"A ranked list: the best is 1, chance is 0, a hidden gene does not count."
import numpy as np

from biojepa.list_scores import budgeted_utility, masked_cosine, place, regret


def test_chance_is_zero_and_the_best_is_one():
    rng = np.random.default_rng(0)
    utility = rng.exponential(size=60)
    assert np.isclose(budgeted_utility(utility, utility, 20), 1)
    assert abs(np.mean([budgeted_utility(rng.random(60), utility, 20) for _ in range(400)])) < 0.05
    assert regret(utility, utility) == 0 and place(utility, [int(utility.argmax())]) == 1


def test_cosine_without_hidden_genes():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 5, 9))
    hide = rng.random((5, 9)) < 0.3
    spoiled = np.where(hide, 1e3, a)
    np.testing.assert_allclose(masked_cosine(a, b, hide), masked_cosine(spoiled, b, hide))
    assert np.isclose(masked_cosine(a, a, hide), 1).all()
