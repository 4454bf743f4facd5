//! No boot loader at all, as in an image made with mmdebstrap: the `/vmlinuz` link, or the newest kernel in `/boot`.

use super::error::BootError;
use super::tree::FileTree;
use super::{Choice, version};

/// Kernels under `prefix` of file system number `fs`, best first. `root_uuid` is that of the root file system.
pub(crate) fn choices(
    tree: &dyn FileTree,
    fs: usize,
    prefix: &str,
    root_uuid: &str,
) -> Result<Vec<Choice>, BootError> {
    let cmdline = format!("root=UUID={root_uuid} ro console=ttyS0");
    let mut found = Vec::new();
    let choice = |kernel: String, initrd: Option<String>, title: String| Choice {
        fs,
        origin: format!("kernel file {kernel}, no boot loader configuration"),
        kernel,
        initrds: initrd.map(|i| (fs, i)).into_iter().collect(),
        cmdline: cmdline.clone(),
        title,
    };
    for dir in ["", prefix] {
        for (kernel, initrd) in [("vmlinuz", "initrd.img"), ("vmlinuz.old", "initrd.img.old")] {
            let (kernel, initrd) = (format!("{dir}/{kernel}"), format!("{dir}/{initrd}"));
            if tree.is_dir(&kernel)? == Some(false) {
                let initrd = Some(initrd).filter(|i| matches!(tree.is_dir(i), Ok(Some(false))));
                found.push(choice(kernel, initrd, "Linux".to_owned()));
            }
        }
        if prefix.is_empty() {
            break;
        }
    }
    let mut versions: Vec<(String, String)> = tree
        .list(&format!("{prefix}/"))?
        .into_iter()
        .filter_map(|name| {
            let version = ["vmlinuz-", "vmlinux-", "bzImage-"]
                .iter()
                .find_map(|p| name.strip_prefix(p))?;
            Some((version.to_owned(), name.clone()))
        })
        .collect();
    versions.sort_by(|(a, _), (b, _)| version::compare(b, a));
    // A rescue kernel sorts by its name, which is no version.
    versions.sort_by_key(|(v, _)| v.contains("rescue"));
    for (version, name) in versions.into_iter().take(16) {
        let mut initrd = None;
        for candidate in [
            format!("initrd.img-{version}"),
            format!("initramfs-{version}.img"),
            format!("initrd-{version}.img"),
            format!("initrd-{version}"),
            format!("initramfs-{version}"),
        ] {
            let path = format!("{prefix}/{candidate}");
            if tree.is_dir(&path)? == Some(false) {
                initrd = Some(path);
                break;
            }
        }
        found.push(choice(
            format!("{prefix}/{name}"),
            initrd,
            format!("Linux {version}"),
        ));
    }
    // `/vmlinuz.old` is for when nothing else works.
    found.sort_by_key(|c| c.kernel.ends_with(".old"));
    Ok(found)
}
