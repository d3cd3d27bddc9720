"""Running what does not fit: blocks of a model pass through slots of the device, ahead of need."""
