"""Tensor trains (matrix product operators) of linears: TT-SVD, weighted least squares, outliers beside them."""
