"""The initialisations that `init_lora_weights` names, and the settings of those that use data."""

STARTS = ("gaussian", "pissa", "olora", "orthogonal", "lq", "eva", "corda", "lora_ga")
DRIVEN = {  # starts that are taken from data, with their settings
    "eva": {"rho": 2.0, "adjust_scaling_factors": True},
    "corda": {"corda_method": "ipm"},
    "lora_ga": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16},
}
CHOICES = {
    "corda_method": ("ipm", "kpm"),
    "direction": ("ArBr", "A2rBr", "ArB2r", "random"),
    "scale": ("stable", "weight_svd", "gd_scale", "unit"),
}
