from torch import nn

from paceline.parallel.dropout import dropouts


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.attention_dropout = dropout
        self.layer = nn.Dropout(dropout)


def test_layers_and_what_attention_is_told_are_found():
    assert dropouts(nn.Sequential(Attention(0.1))) == {"0.attention_dropout": 0.1, "0.layer": 0.1}
    assert dropouts(nn.Sequential(Attention(0.0), nn.Dropout(0.0))) == {}
