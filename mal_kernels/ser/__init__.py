"""Speech emotion recognition in conversation with Memory-as-a-Layer: data, training, controls.

``python -m mal_kernels.ser --help`` lists the commands; nothing is imported here.
"""
