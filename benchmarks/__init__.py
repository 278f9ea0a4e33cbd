"""Measurements: speed, memory and error of fastcontrast beside its peers and physical limits."""
