//! Ordinary hosts on which a create went wrong: inputs made after public bug reports, judged by other programs.

mod files;
mod identity;
mod loops;
mod sectors;
mod told;
mod unmarked;
mod watching;
mod windows;
