//! The KVM virtual machine monitor: vCPUs, memory, devices, boot, quiesce, state.
