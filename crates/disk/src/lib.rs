//! Disk images, boot discovery, volumes with an epoch journal.
