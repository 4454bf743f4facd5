//! Seeded simulation of the epoch protocol over a fake world.
