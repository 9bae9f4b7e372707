//! The public API as text, so that a review sees every change of it.
//!
//! `src/api.txt` lists each public item with its signature, without function bodies, docs and private fields. It is made
//! from the sources, so it needs no nightly compiler and holds the items of every feature. After a change of the API:
//! `UPDATE_API=1 cargo test -p kvferry --lib api` writes the list again.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use syn::{Attribute, Fields, ImplItem, Item, TraitItem, Type, UseTree, Visibility, parse_quote};

const LIST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/api.txt");

/// The crates of the API, by name, with their sources.
const CRATES: [(&str, &str); 2] = [("crate", "src"), ("kvferry_proto", "crates/proto/src")];

/// A module: its crate's name, then the names of the modules around it and its own.
type Module = Vec<String>;

/// The items of every module.
#[derive(Default)]
struct Sources(HashMap<Module, Vec<Item>>);

fn is_public(vis: &Visibility) -> bool {
    matches!(vis, Visibility::Public(_))
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(i) => &i.attrs,
        Item::Enum(i) => &i.attrs,
        Item::Fn(i) => &i.attrs,
        Item::Impl(i) => &i.attrs,
        Item::Mod(i) => &i.attrs,
        Item::Struct(i) => &i.attrs,
        Item::Trait(i) => &i.attrs,
        Item::Type(i) => &i.attrs,
        Item::Use(i) => &i.attrs,
        _ => &[],
    }
}

fn is_test(item: &Item) -> bool {
    let test: Attribute = parse_quote!(#[cfg(test)]);
    attributes(item).contains(&test)
}

/// The name and visibility of an item of the API.
fn named(item: &Item) -> Option<(String, &Visibility)> {
    Some(match item {
        Item::Const(i) => (i.ident.to_string(), &i.vis),
        Item::Enum(i) => (i.ident.to_string(), &i.vis),
        Item::Fn(i) => (i.sig.ident.to_string(), &i.vis),
        Item::Mod(i) => (i.ident.to_string(), &i.vis),
        Item::Struct(i) => (i.ident.to_string(), &i.vis),
        Item::Trait(i) => (i.ident.to_string(), &i.vis),
        Item::Type(i) => (i.ident.to_string(), &i.vis),
        _ => return None,
    })
}

/// The paths that a `use` imports, with the name of each: `*` for all names of a module.
fn imports(tree: &UseTree, prefix: &[String], into: &mut Vec<(String, Vec<String>)>) {
    let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
    match tree {
        UseTree::Path(p) => imports(&p.tree, &with(&p.ident), into),
        UseTree::Group(g) => g.items.iter().for_each(|t| imports(t, prefix, into)),
        UseTree::Name(n) if n.ident == "self" => into.extend(prefix.last().map(|l| (l.clone(), prefix.to_vec()))),
        UseTree::Name(n) => into.push((n.ident.to_string(), with(&n.ident))),
        UseTree::Rename(r) => into.push((r.rename.to_string(), with(&r.ident))),
        UseTree::Glob(_) => into.push(("*".to_owned(), prefix.to_vec())),
    }
}

impl Sources {
    fn load(&mut self, module: Module, items: Vec<Item>, children: &Path) {
        for item in &items {
            let Item::Mod(m) = item else { continue };
            if is_test(item) {
                continue;
            }
            let name = m.ident.to_string();
            let inner = children.join(&name);
            let items = match &m.content {
                Some((_, items)) => items.clone(),
                None => {
                    let files = [children.join(format!("{name}.rs")), inner.join("mod.rs")];
                    let text = files.iter().find_map(|f| fs::read_to_string(f).ok()).expect("a module has a file");
                    syn::parse_file(&text).expect("it compiles").items
                }
            };
            self.load([&module[..], &[name]].concat(), items, &inner);
        }
        self.0.insert(module, items);
    }

    /// Where the item of this name in `module` is defined, through any number of imports: public ones only, if it must be
    /// `exported` from there.
    fn definition(&self, module: &[String], name: &str, exported: bool) -> Option<(Module, String)> {
        let items = self.0.get(module)?;
        if items.iter().filter_map(named).any(|(n, _)| n == name) {
            return Some((module.to_vec(), name.to_owned()));
        }
        let mut found = Vec::new();
        for item in items {
            if let Item::Use(u) = item
                && (!exported || is_public(&u.vis))
            {
                imports(&u.tree, &[], &mut found);
            }
        }
        if let Some((_, path)) = found.iter().find(|(n, _)| n == name) {
            let (last, path) = path.split_last()?;
            return self.definition(&self.module(module, path)?, last, false);
        }
        let globs = found.iter().filter(|(n, _)| n == "*").filter_map(|(_, path)| self.module(module, path));
        // What a glob brings is what its module exports: its private imports may lead back here.
        globs.into_iter().find_map(|m| self.definition(&m, name, true))
    }

    /// The module at `path`, as written in `from`.
    fn module(&self, from: &[String], path: &[String]) -> Option<Module> {
        let mut at = from.to_vec();
        for (i, part) in path.iter().enumerate() {
            match part.as_str() {
                "self" => {}
                "super" => drop(at.pop()),
                "crate" => at.truncate(1),
                name if i == 0 && CRATES.iter().any(|(c, _)| *c == name) => at = vec![name.to_owned()],
                name => at.push(name.to_owned()),
            }
        }
        self.0.contains_key(&at).then_some(at)
    }

    /// Lists the public items of a module under the public path `prefix`.
    fn list(&self, module: &[String], prefix: &str, into: &mut BTreeMap<String, String>) {
        for item in &self.0[module] {
            if let Item::Use(u) = item
                && is_public(&u.vis)
            {
                let mut paths = Vec::new();
                imports(&u.tree, &[], &mut paths);
                for (name, _) in paths {
                    let (from, original) = self.definition(module, &name, false).expect("a re-export leads to an item");
                    into.insert(format!("{prefix}::{name}"), self.text(&from, &original));
                }
            } else if let Some((name, vis)) = named(item)
                && is_public(vis)
                && !is_test(item)
            {
                let path = format!("{prefix}::{name}");
                match item {
                    Item::Mod(_) => self.list(&[module, &[name]].concat(), &path, into),
                    _ => drop(into.insert(path, self.text(module, &name))),
                }
            }
        }
    }

    /// An item and its `impl` blocks.
    fn text(&self, module: &[String], name: &str) -> String {
        let item = self.0[module].iter().find(|i| named(i).is_some_and(|(n, _)| n == name));
        let mut items = vec![public_part(item.expect("it is defined here").clone())];
        let mut impls = Vec::new();
        for (at, all) in &self.0 {
            for item in all {
                if let Item::Impl(i) = item
                    && !is_test(item)
                    && let Type::Path(p) = &*i.self_ty
                    && let Some(last) = p.path.segments.last()
                    && last.ident == name
                    && self.definition(at, name, false).is_some_and(|(m, n)| m == module && n == name)
                    && let Some(item) = public_impl(i.clone())
                {
                    impls.push(item);
                }
            }
        }
        let print =
            |item: &Item| prettyplease::unparse(&syn::File { shebang: None, attrs: vec![], items: vec![item.clone()] });
        impls.sort_by_key(print);
        items.extend(impls);
        items.iter().map(print).collect()
    }
}

/// Keeps the attributes that a user of the item notices.
fn keep(attrs: &mut Vec<Attribute>) {
    attrs.retain(|a| ["cfg", "derive", "non_exhaustive", "must_use"].iter().any(|name| a.path().is_ident(name)));
}

fn public_fields(fields: &mut Fields, attrs: &mut Vec<Attribute>) {
    let before = fields.len();
    if let Fields::Named(f) = fields {
        f.named = std::mem::take(&mut f.named).into_iter().filter(|f| is_public(&f.vis)).collect();
    } else if let Fields::Unnamed(f) = fields {
        f.unnamed = std::mem::take(&mut f.unnamed).into_iter().filter(|f| is_public(&f.vis)).collect();
    }
    if fields.len() < before {
        attrs.push(parse_quote!(#[doc = " Has private fields."]));
    }
    fields.iter_mut().for_each(|f| f.attrs.clear());
}

fn public_part(mut item: Item) -> Item {
    match &mut item {
        Item::Struct(s) => {
            keep(&mut s.attrs);
            public_fields(&mut s.fields, &mut s.attrs);
        }
        Item::Enum(e) => {
            keep(&mut e.attrs);
            for v in &mut e.variants {
                v.attrs.clear();
                v.fields.iter_mut().for_each(|f| f.attrs.clear());
            }
        }
        Item::Fn(f) => {
            keep(&mut f.attrs);
            f.block.stmts.clear();
        }
        Item::Const(c) => keep(&mut c.attrs),
        Item::Type(t) => keep(&mut t.attrs),
        Item::Trait(t) => {
            keep(&mut t.attrs);
            for item in &mut t.items {
                match item {
                    TraitItem::Fn(f) => {
                        f.attrs.clear();
                        f.default.iter_mut().for_each(|b| b.stmts.clear());
                    }
                    TraitItem::Type(t) => t.attrs.clear(),
                    _ => {}
                }
            }
        }
        _ => {}
    }
    item
}

/// The public functions and constants of an inherent `impl`; only the header of a trait's; `None`: there are none.
fn public_impl(mut block: syn::ItemImpl) -> Option<Item> {
    keep(&mut block.attrs);
    if block.trait_.is_some() {
        block.items.clear();
        return Some(block.into());
    }
    block.items.retain(|i| match i {
        ImplItem::Fn(f) => is_public(&f.vis),
        ImplItem::Const(c) => is_public(&c.vis),
        _ => false,
    });
    for item in &mut block.items {
        match item {
            ImplItem::Fn(f) => {
                keep(&mut f.attrs);
                f.block.stmts.clear();
            }
            ImplItem::Const(c) => keep(&mut c.attrs),
            _ => {}
        }
    }
    (!block.items.is_empty()).then(|| block.into())
}

#[test]
fn the_public_api_is_as_listed() {
    let mut sources = Sources::default();
    for (name, folder) in CRATES {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let text = fs::read_to_string(folder.join("lib.rs")).expect("a crate has a lib.rs");
        sources.load(vec![name.to_owned()], syn::parse_file(&text).expect("it compiles").items, &folder);
    }
    let mut list = BTreeMap::new();
    sources.list(&["crate".to_owned()], "kvferry", &mut list);
    let text: String = list.iter().map(|(path, item)| format!("// {path}\n{item}\n")).collect();
    if std::env::var_os("UPDATE_API").is_some() {
        fs::write(LIST, &text).expect("the list can be written");
    }
    let listed = fs::read_to_string(LIST).unwrap_or_default();
    let line = text
        .lines()
        .zip(listed.lines())
        .position(|(a, b)| a != b)
        .unwrap_or(text.lines().count().min(listed.lines().count()));
    assert!(
        text == listed,
        "the public API differs from src/api.txt at line {}:\n  now:    {}\n  listed: {}\n\
         If the change is intended: UPDATE_API=1 cargo test -p kvferry --lib api",
        line + 1,
        text.lines().nth(line).unwrap_or("the end"),
        listed.lines().nth(line).unwrap_or("the end"),
    );
}
