//! Legacy parts of a PC: serial port, keyboard controller, pvpanic, ACPI power.
