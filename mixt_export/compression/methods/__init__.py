"""The compression methods: one module each, holding what distinguishes it as data (a ``METHOD``)."""
