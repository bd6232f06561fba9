"""The product of operators, dtypes, averages, layouts, shapes, architectures and orders: `make test-emulated`."""
