"""How weights go: model families, calibration, importance metrics, masks, reconstruction, surgery, export."""
