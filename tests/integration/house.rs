//! The order of the source: imports without circles, between files and between rooms, and only downwards in the map of
//! `src/lib.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

use crate::support::rust_files;

/// A module by its path from the crate's root: `["cache", "void"]`.
type Module = Vec<String>;

/// Every module with the modules that it imports. A file that declares a module does not import it by that.
fn imports(source: &Path) -> BTreeMap<Module, BTreeSet<Module>> {
    let files: BTreeMap<Module, PathBuf> =
        rust_files(source).into_iter().filter_map(|file| Some((module(file.strip_prefix(source).unwrap())?, file))).collect();
    let modules: BTreeSet<Module> = files.keys().cloned().collect();
    let of = |(module, file): (&Module, &PathBuf)| {
        let syntax = syn::parse_file(&std::fs::read_to_string(file).unwrap()).unwrap();
        let mut names = Names { module, modules: &modules, imported: BTreeSet::new() };
        names.visit_file(&syntax);
        names.imported.remove(module);
        (module.clone(), names.imported)
    };
    files.iter().map(of).collect()
}

/// The module of a file, by its path below the source; the crate's roots are none.
fn module(file: &Path) -> Option<Module> {
    let mut module: Module = file.with_extension("").iter().map(|name| name.to_str().unwrap().to_owned()).collect();
    let name = module.pop()?;
    match name.as_str() {
        "lib" | "main" => return None,
        "mod" => {}
        _ => module.push(name),
    }
    Some(module)
}

/// Finds the modules that a file's paths name, tests aside.
struct Names<'a> {
    module: &'a Module,
    modules: &'a BTreeSet<Module>,
    imported: BTreeSet<Module>,
}

impl Names<'_> {
    /// A path such as `crate::cache::void::Voids`, `super::Fetcher` or `void::Voids` leads to the module that it begins with.
    fn note(&mut self, path: &[String]) {
        let mut absolute: Module = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("super") => self.module[..self.module.len() - 1].to_vec(),
            _ => self.module.clone(),
        };
        let skip = usize::from(matches!(path.first().map(String::as_str), Some("crate" | "super" | "self")));
        let relative = skip == 0;
        absolute.extend_from_slice(&path[skip..]);
        let depth = if relative { self.module.len() + 1 } else { 1 };
        let known = (depth..=absolute.len()).rev().map(|end| absolute[..end].to_vec()).find(|module| self.modules.contains(module));
        self.imported.extend(known);
    }

    fn note_tree(&mut self, tree: &syn::UseTree, prefix: &mut Vec<String>) {
        match tree {
            syn::UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.note_tree(&path.tree, prefix);
                prefix.pop();
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.note_tree(item, prefix)),
            syn::UseTree::Name(syn::UseName { ident }) | syn::UseTree::Rename(syn::UseRename { ident, .. }) => {
                prefix.push(ident.to_string());
                self.note(prefix);
                prefix.pop();
            }
            syn::UseTree::Glob(_) => self.note(prefix),
        }
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg") && attribute.parse_args::<syn::Ident>().is_ok_and(|condition| condition == "test")
    })
}

impl<'ast> Visit<'ast> for Names<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        // `use ::http::…` is the library of that name.
        if item.leading_colon.is_none() {
            self.note_tree(&item.tree, &mut Vec::new());
        }
    }

    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {
        // `pub(super)` imports nothing.
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() && path.segments.first().is_some_and(|first| first.ident == "crate" || first.ident == "super") {
            let names: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.note(&names);
        }
        visit::visit_path(self, path);
    }
}

/// A circle of arrows, if there is one: its members in order.
fn circle<N: Ord + Clone>(arrows: &BTreeMap<N, BTreeSet<N>>) -> Option<Vec<N>> {
    fn walk<N: Ord + Clone>(node: &N, arrows: &BTreeMap<N, BTreeSet<N>>, way: &mut Vec<N>, done: &mut BTreeSet<N>) -> Option<Vec<N>> {
        if let Some(start) = way.iter().position(|known| known == node) {
            return Some(way[start..].to_vec());
        }
        if done.contains(node) {
            return None;
        }
        way.push(node.clone());
        let found = arrows.get(node).into_iter().flatten().find_map(|next| walk(next, arrows, way, done));
        way.pop();
        done.insert(node.clone());
        found
    }
    let mut done = BTreeSet::new();
    arrows.keys().find_map(|node| walk(node, arrows, &mut Vec::new(), &mut done))
}

fn source() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn no_files_and_no_rooms_import_each_other_in_a_circle() {
    let files = imports(&source());
    assert!(files.len() > 80 && files.values().flatten().count() > 200, "the imports were read");
    assert_eq!(circle(&files), None, "files that import each other in a circle");
    let mut rooms: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (module, imported) in &files {
        let others = imported.iter().map(|other| other[0].clone()).filter(|other| *other != module[0]);
        rooms.entry(module[0].clone()).or_default().extend(others);
    }
    assert_eq!(circle(&rooms), None, "rooms that import each other in a circle");
}

#[test]
fn rooms_import_only_what_stands_below_them_in_the_map() {
    let map = std::fs::read_to_string(source().join("lib.rs")).unwrap();
    let rooms: Vec<&str> = map.lines().filter_map(|line| line.strip_prefix("//! | [`")?.split('`').next()).collect();
    let declared: BTreeSet<&str> = map.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert_eq!(rooms.iter().copied().collect::<BTreeSet<_>>(), declared, "the map shows every room");
    let floor = |room: &str| rooms.iter().position(|known| *known == room).unwrap();
    for (module, imported) in imports(&source()) {
        for other in imported.iter().filter(|other| other[0] != module[0]) {
            assert!(floor(&module[0]) < floor(&other[0]), "{} imports {}, which stands above it", module.join("::"), other.join("::"));
        }
    }
}

#[test]
fn a_circle_is_found_where_there_is_one() {
    let arrows = |pairs: &[(&'static str, &'static str)]| {
        let mut arrows: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (from, to) in pairs {
            arrows.entry(from).or_default().insert(to);
        }
        arrows
    };
    assert_eq!(circle(&arrows(&[("a", "b"), ("b", "c"), ("a", "c")])), None);
    assert_eq!(circle(&arrows(&[("a", "b"), ("b", "c"), ("c", "b")])), Some(vec!["b", "c"]));
}
