//! Which execution ports a function's longest loop fills: taken out of the program as it was built, and given to
//! llvm-mca, which knows the CPU's ports.

use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Debian's name of it, in the version that knows Zen 4.
const MODEL: &str = "llvm-mca-19";
/// Ports that are named in a line.
const SHOWN: usize = 5;

/// What the model says of a loop.
#[derive(Debug)]
pub struct Loop {
    /// Its whole report.
    pub report: String,
}

impl Loop {
    /// Cycles, and the ports that are busy for most of them.
    pub fn summary(&self) -> String {
        let cycles = self.cycles().unwrap_or(f64::NAN);
        let mut pressure = self.pressure();
        pressure.sort_by(|a, b| b.1.total_cmp(&a.1));
        let ports: Vec<_> = pressure
            .iter()
            .take(SHOWN)
            .map(|(name, busy)| format!("{name} {busy:.0}"))
            .collect();
        format!("{cycles:.0} cycles: {}", ports.join(", "))
    }

    /// Cycles of an iteration.
    fn cycles(&self) -> Option<f64> {
        let number = |name: &str| {
            let line = self
                .report
                .lines()
                .find_map(|line| line.strip_prefix(name))?;
            line.trim().parse::<f64>().ok()
        };
        Some(number("Total Cycles:")? / number("Iterations:")?)
    }

    /// Ports by name, with the cycles of an iteration for which they are busy.
    fn pressure(&self) -> Vec<(&str, f64)> {
        let mut lines = self.report.lines();
        let names = lines
            .by_ref()
            .skip_while(|line| *line != "Resources:")
            .skip(1)
            .take_while(|line| line.starts_with('['))
            .filter_map(|line| line.rsplit_once("- "));
        let names: Vec<&str> = names.map(|(_, name)| name).collect();
        let figures = lines
            .skip_while(|line| !line.starts_with("Resource pressure per iteration"))
            .nth(2)
            .unwrap_or_default();
        let figures = figures.split_whitespace();
        let busy = figures.map(|figure| figure.parse().unwrap_or(0.0));
        names.into_iter().zip(busy).collect()
    }
}

/// The longest loop of a function, by the end of its path.
///
/// # Errors
/// When a tool is missing, or there is no such function or loop.
pub fn of_loop(program: &Path, function: &str) -> Result<Loop, Box<dyn Error>> {
    let (start, end) = place(
        &output(Command::new("nm").args(["-C", "-S"]).arg(program))?,
        function,
    )
    .ok_or_else(|| format!("{} has no {function}", program.display()))?;
    let text = output(
        Command::new("objdump")
            .args(["-d", "--no-show-raw-insn"])
            .arg(format!("--start-address={start}"))
            .arg(format!("--stop-address={end}"))
            .arg(program),
    )?;
    let code =
        longest_loop(&instructions(&text)).ok_or_else(|| format!("{function} has no loop"))?;
    let report = model(&code)?;
    Ok(Loop { report })
}

/// From and to where a function goes.
fn place(symbols: &str, function: &str) -> Option<(u64, u64)> {
    let line = symbols.lines().find(|line| line.ends_with(function))?;
    let mut words = line.split_whitespace();
    let mut number = || u64::from_str_radix(words.next()?, 16).ok();
    let (start, size) = (number()?, number()?);
    Some((start, start + size))
}

/// Addresses and instructions of a listing, without comments and names.
fn instructions(listing: &str) -> Vec<(u64, String)> {
    let line = |line: &str| {
        let (address, text) = line.split_once(":\t")?;
        let address = u64::from_str_radix(address.trim(), 16).ok()?;
        let text = text.split(['#', '<']).next().unwrap_or_default();
        Some((address, text.trim().to_owned()))
    };
    listing.lines().filter_map(line).collect()
}

/// The instructions between a jump back and where it goes; jumps lose their target, which the model doesn't take.
fn longest_loop(code: &[(u64, String)]) -> Option<String> {
    let back = code.iter().filter_map(|(at, text)| {
        let target = u64::from_str_radix(jump(text)?.1, 16).ok()?;
        (target < *at && target >= code.first()?.0).then_some((target, *at))
    });
    let (first, last) = back.max_by_key(|(first, last)| last - first)?;
    let body = code.iter().filter(|(at, _)| (first..=last).contains(at));
    let text = body.map(|(_, text)| match jump(text) {
        Some((name, _)) => format!("{name} .L\n"),
        None => format!("{text}\n"),
    });
    Some(text.collect())
}

/// Name and target of a jump.
fn jump(text: &str) -> Option<(&str, &str)> {
    let (name, target) = text.split_once(char::is_whitespace)?;
    name.starts_with('j').then_some((name, target.trim()))
}

fn model(code: &str) -> Result<String, Box<dyn Error>> {
    let mut child = Command::new(MODEL)
        .args([
            "-iterations=100",
            "-instruction-info=0",
            "-bottleneck-analysis",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{MODEL} can't be started ({e})"))?;
    // It reads everything before it writes.
    let mut input = child.stdin.take().ok_or("no pipe")?;
    input.write_all(code.as_bytes())?;
    drop(input);
    text(MODEL, &child.wait_with_output()?)
}

fn output(command: &mut Command) -> Result<String, Box<dyn Error>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|e| format!("{name} can't be started ({e})"))?;
    text(&name, &output)
}

fn text(name: &str, output: &std::process::Output) -> Result<String, Box<dyn Error>> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name} failed: {}", errors.trim()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_found_in_a_listing() {
        let listing = "prog:     file format elf64-x86-64\n\n0000000000001000 <f>:\n    \
            1000:\ttest   %rdx,%rdx\n    1003:\tje     1013 <f+0x13>\n    \
            1005:\tlea    0x10(%rip),%rax        # 2000 <C>\n    1009:\tvaesenc %zmm1,%zmm0,%zmm0\n    \
            100f:\tjne    1009 <f+0x9>\n    1011:\tjne    1005 <f+0x5>\n    1013:\tret\n";
        let code = instructions(listing);
        assert_eq!(code.len(), 7);
        let body = longest_loop(&code).expect("a loop");
        assert_eq!(
            body,
            "lea    0x10(%rip),%rax\nvaesenc %zmm1,%zmm0,%zmm0\njne .L\njne .L\n"
        );
        assert_eq!(longest_loop(&code[..2]), None);
    }

    #[test]
    fn a_function_is_found_by_the_end_of_its_path() {
        let symbols =
            "0000000000001000 0000000000000013 t a::b::encrypt\n                 U free\n";
        assert_eq!(place(symbols, "b::encrypt"), Some((0x1000, 0x1013)));
        assert_eq!(place(symbols, "b::decrypt"), None);
    }

    #[test]
    fn the_busiest_ports_come_first() {
        let report = "Iterations:        100\nTotal Cycles:      12619\n\nResources:\n[0]   - Zn4AGU0\n\
            [8]   - Zn4FP0\n[12.0] - Zn4FP45\n\n\nResource pressure per iteration:\n[0]    [8]    [12.0]\n \
            -     126.04 44.00\n";
        let report = report.to_owned();
        assert_eq!(
            Loop { report }.summary(),
            "126 cycles: Zn4FP0 126, Zn4FP45 44, Zn4AGU0 0"
        );
    }
}
