import pytest
import torch

from mmtp.models.backbone import Backbone, BackboneConfig
from mmtp.models.deepseek import from_deepseek, to_deepseek
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.shared import SharedHead
from mmtp.models.qwen3 import Qwen3Error, from_qwen3, to_qwen3
from mmtp.types import Modality

CONFIG = BackboneConfig(width=32, depth=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
TABLE = torch.randn(10, 32)


def head(kind: type[SequentialHead] = SequentialHead, depth: int = 2) -> SequentialHead:
    return kind(kind.Config(mtp_depth=depth), CONFIG, (Modality.TEXT,))


@pytest.mark.parametrize(("kind", "modules"), [(SequentialHead, 2), (SharedHead, 1)])
def test_there_and_back_changes_nothing_beside_a_backbone(kind: type[SequentialHead], modules: int) -> None:
    state, backbone = head(kind).state_dict(), Backbone(CONFIG).state_dict()
    exported = to_qwen3(backbone, CONFIG, TABLE, TABLE) | to_deepseek(state, CONFIG)
    numbers = {int(name.split(".")[2]) for name in exported if name.startswith("model.layers.")}
    assert numbers == set(range(3 + modules))
    assert {"model.layers.3.enorm.weight", "model.layers.3.eh_proj.weight", "model.layers.3.self_attn.q_proj.weight"} <= exported.keys()
    back = from_deepseek(exported, CONFIG)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    kept, _, _ = from_qwen3(exported, CONFIG)
    assert all(torch.equal(kept[name], backbone[name]) for name in backbone)
    head(kind).load_state_dict(back)


def test_says_which_weight_is_missing_and_where_modules_are_looked_for() -> None:
    exported = to_deepseek(head().state_dict(), CONFIG)
    latent = {name.replace("q_proj", "q_a_proj"): weight for name, weight in exported.items()}
    with pytest.raises(Qwen3Error, match=r"no 'model\.layers\.3\.self_attn\.q_proj\.weight'"):
        from_deepseek(latent, CONFIG)
    with pytest.raises(Qwen3Error, match=r"from model\.layers\.3 on, behind 3 layers; found none"):
        from_deepseek({}, CONFIG)
    deeper = BackboneConfig(**CONFIG.to_dict() | {"depth": 4})
    with pytest.raises(Qwen3Error, match=r"from model\.layers\.4 on, behind 4 layers; found \[3, 4\]"):
        from_deepseek(exported, deeper)
