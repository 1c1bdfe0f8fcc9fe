"""The one family of errors that this project raises on purpose."""


class LoRAError(ValueError):
    """Says what is wrong and what to do about it, in one message meant for the user.

    Form: `` `name` (=value) must …; what exists, or what to do ``.
    """


class TargetError(LoRAError):
    """Some pattern of `target_modules` matches nothing that LoRA can adapt."""


class AdapterFileError(LoRAError):
    """An adapter's files are missing, damaged or do not fit the model."""


class NonFiniteLossError(LoRAError):
    """The training loss became NaN or infinite."""
