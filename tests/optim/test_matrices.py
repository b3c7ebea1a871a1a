import torch

from paceline.optim.shampoo import inverse_root
from paceline.optim.soap import eigenbasis


def covariance_of_a_table():
    """Of the gradient of a table of which a fifth of the rows were looked at, some hardly: LAPACK's eigenvectors do not
    converge in fp32."""
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(2048, 64)
    rows = torch.randperm(2048, generator=generator)[:400]
    table[rows] = 1e-4 * torch.randn(400, 64, generator=generator) * torch.logspace(0, -6, 400)[:, None]
    return (0.05 * table @ table.mT).unsqueeze(0)


def test_a_basis_of_a_table_in_fp32():
    covariance = covariance_of_a_table()
    (basis,) = eigenbasis(covariance)
    assert basis.dtype == torch.float32
    assert (basis.mT @ basis - torch.eye(2048)).abs().max() < 1e-5
    turned = basis.mT.double() @ covariance[0].double() @ basis.double()
    assert (turned - turned.diag().diag()).norm() < 1e-5 * covariance.norm()


def test_a_root_of_a_table_in_fp32():
    covariance = covariance_of_a_table()
    (root,) = inverse_root(covariance, 4, 1e-6)
    known = torch.linalg.eigvalsh(covariance[0].double())
    greatest = (known.amax() * 1e-6) ** -0.25
    assert root.isfinite().all() and abs(torch.linalg.matrix_norm(root.double(), 2) / greatest - 1) < 1e-3
