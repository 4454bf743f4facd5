//! A data centre in a box: simulated servers, switches, disks, and the axe.
