import pytest
import torch
from torch import nn

from averaging.flatten import FlatParameters


def tied_model(seed: int = 0) -> nn.Module:
    """Two linear layers and an embedding tied to the first."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.LayerNorm(5))
    model[1].weight = model[0].weight
    return model


def test_values_are_kept_and_tied_parameters_appear_once() -> None:
    reference, model = tied_model(), tied_model()
    flat = FlatParameters(model)
    assert flat.names == ("0.weight", "2.weight", "2.bias")
    assert flat.theta.shape == (5 * 3 + 5 + 5,)
    assert flat.offsets == {"0.weight": 0, "2.weight": 15, "2.bias": 20}
    for name, view in flat.views(flat.theta).items():
        assert torch.equal(view, reference.get_parameter(name))
    tokens = torch.tensor([[1, 4, 2]])
    assert torch.equal(model(tokens), reference(tokens))


def test_optimizer_and_model_work_on_theta() -> None:
    model = tied_model()
    flat = FlatParameters(model)
    before = flat.theta.clone()
    model(torch.tensor([0, 1])).pow(3).sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert not torch.equal(flat.theta, before)
    flat.theta.zero_()
    assert all(not parameter.any() for parameter in model.parameters())
    assert flat.is_intact()


def test_loading_weights_keeps_the_tie_and_moving_the_module_breaks_it() -> None:
    model = tied_model()
    flat = FlatParameters(model)
    model.load_state_dict(tied_model(seed=1).state_dict())
    assert flat.is_intact()
    assert torch.equal(flat.theta[:15].view(5, 3), model.get_parameter("0.weight"))
    model.double().float()
    assert not flat.is_intact()


def test_views_of_another_length_are_refused() -> None:
    flat = FlatParameters(tied_model())
    with pytest.raises(ValueError, match="25 elements"):
        flat.views(torch.zeros(24))


@pytest.mark.parametrize("module", [nn.Identity(), nn.Linear(2, 2).double()])
def test_unsuitable_modules_are_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="parameters"):
        FlatParameters(module)
