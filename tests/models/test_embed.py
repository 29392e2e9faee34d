import pytest
import torch

from mmtp.models.connector import Projector, Resampler
from mmtp.models.embed import FeatureError
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import PackingError, collate
from mmtp.stream.template import encode_document
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.types import Batch, Modality, Segment
from tests.models.common import BACKBONE

LAYOUT = VocabLayout(TextEntry("words", 50), (MediaEntry(Modality.IMAGE, "vit"),), 16)
GRAMMAR = StreamGrammar(LAYOUT)
WIDTH = 5
CONNECTORS = {
    "linear": Projector.Config(layers=1),
    "merged": Projector.Config(merge=2),
    "resampler": Resampler.Config(num_queries=3, depth=1, num_heads=2),
}


def reader(connector) -> UnifiedModel:
    torch.manual_seed(0)
    return UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, feature_width=WIDTH, connector=connector).build().eval()


def captioned(connector, *grids: tuple[int, int]) -> Batch:
    """Pictures of these grids, three words behind each, packed into one row."""
    documents = []
    for i, grid in enumerate(grids):
        features = torch.randn(*grid, WIDTH, generator=torch.Generator().manual_seed(i))
        picture = Segment(Modality.IMAGE, features=features, places=connector.places(grid), target=False)
        document = encode_document(LAYOUT, (picture, Segment(Modality.TEXT, torch.tensor([1, 2, 3]))))
        documents.append((document.tokens, document.target_mask, document.features, document.feature_grids))
    return collate(documents, GRAMMAR, 80)


@pytest.fixture(params=CONNECTORS)
def connector(request):
    return CONNECTORS[request.param]


def test_what_a_model_reads_is_what_its_connector_makes_of_each_picture(connector):
    net = reader(connector)
    batch = captioned(connector, (3, 4), (2, 5))
    assert batch.feature_grids.tolist() == [[3, 4], [2, 5]]
    places = {"linear": 22, "merged": 4 + 3, "resampler": 6}[next(k for k, v in CONNECTORS.items() if v == connector)]
    assert len(batch.feature_index) == places
    embedded = net.embedding.batch(batch).flatten(0, 1)[batch.feature_index]
    alone = [net.embedding.connect(f, g[None]) for f, g in zip(batch.features.split([12, 10]), batch.feature_grids, strict=True)]
    torch.testing.assert_close(embedded, torch.cat(alone), atol=1e-6, rtol=1e-5)
    net.loss(batch, LossConfig()).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in net.embedding.features.parameters())


def test_configuration_with_a_connector_survives_a_round_trip(connector):
    config = reader(connector).config
    data = config.to_dict()
    assert data["connector"]["type"] in ("projector", "resampler")
    assert UnifiedModel.Config.from_dict(data) == config


def test_streams_for_another_connector_are_refused():
    with pytest.raises(FeatureError, match="the streams have 22 places for 22 continuous features, the model's connector makes 6 of them"):
        reader(CONNECTORS["resampler"])(captioned(CONNECTORS["linear"], (3, 4), (2, 5)))
    document = encode_document(LAYOUT, (Segment(Modality.IMAGE, features=torch.zeros(2, 2, WIDTH), places=(1, 3)),))
    with pytest.raises(PackingError, match="3 <feature> tokens, but 4 feature vectors, 3 wanted"):
        collate([(document.tokens, document.target_mask, document.features)], GRAMMAR, 20)


def test_models_saved_with_one_linear_layer_load():
    net = reader(CONNECTORS["linear"])
    old = {key.replace("features.layers.0.", "features."): value for key, value in net.state_dict().items()}
    assert "embedding.features.weight" in old
    again = reader(CONNECTORS["linear"])
    torch.nn.init.zeros_(again.embedding.features.layers[0].weight)
    again.load_state_dict(old)
    assert torch.equal(again.embedding.features.layers[0].weight, net.embedding.features.layers[0].weight)
