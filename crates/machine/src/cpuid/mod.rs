//! CPUID: what a vCPU tells its guest about itself.
