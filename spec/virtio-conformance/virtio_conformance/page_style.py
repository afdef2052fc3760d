# SPDX-License-Identifier: Apache-2.0
"""Style and script of the report page: one file that needs nothing else."""

__all__ = ("SCRIPT", "STYLE")

STYLE = """
:root{--line:#d0d7de;--soft:#57606a;--back:#f6f8fa}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:1.5rem auto;padding:0 1rem;
color:#1f2328;background:#fff}
h1{font-size:1.5rem;margin:.2rem 0 .6rem}
h2{font-size:1.2rem;margin-top:2rem;border-bottom:1px solid var(--line)}
code,pre,.id{font:12px/1.45 ui-monospace,monospace;overflow-wrap:anywhere}
pre{background:var(--back);padding:.6rem;overflow-x:auto;overflow-wrap:normal;margin:.3rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .8rem;margin:.4rem 0}
dt{color:var(--soft)} dd{margin:0;min-width:0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .6rem;text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600} tr{border-top:1px solid #eaeef2}
.chip{display:inline-block;border-radius:1rem;padding:0 .6rem;font-weight:600;white-space:nowrap;
background:var(--back)}
.failed{color:#a40e26;background:#ffebe9} .warned{color:#7d4e00;background:#fff8c5}
.fragile{color:#6639ba;background:#fbefff} .advised{color:#1b5e75;background:#ddf4ff}
.passed{color:#116329;background:#dafbe1} .undecided{color:#0550ae;background:#eef6ff}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .9rem;margin:.7rem 0}
.card h3{font-size:1rem;margin:0 0 .3rem} .card p{margin:.3rem 0}
details{margin:.3rem 0} summary{cursor:pointer;overflow-wrap:anywhere}
.soft{color:var(--soft)} .id{color:var(--soft)}
.filter{display:flex;flex-wrap:wrap;gap:.4rem .9rem;align-items:center;margin:.8rem 0;
position:sticky;top:0;background:#fff;padding:.5rem 0;border-bottom:1px solid var(--line)}
.filter input[type=search]{flex:1 1 14rem;padding:.3rem .5rem;font:inherit;min-width:0}
@media (max-width:640px){
.filter{position:static}
table,tbody,tr,td{display:block;width:100%} thead{display:none}
tr{padding:.4rem 0} td{padding:.1rem 0} td:nth-child(-n+2){display:inline;width:auto;
margin-right:.5rem}
dl{grid-template-columns:1fr} dt{margin-top:.3rem}
}
"""

SCRIPT = """
const words=document.querySelector('#words'),boxes=[...document.querySelectorAll('.filter [name]')];
function apply(){
const on=new Set(boxes.filter(b=>b.checked).map(b=>b.name)),text=words.value.toLowerCase();
for(const one of document.querySelectorAll('[data-status]'))
one.hidden=!on.has(one.dataset.status)||!one.textContent.toLowerCase().includes(text);
for(const part of document.querySelectorAll('section.chapter'))
part.hidden=![...part.querySelectorAll('[data-status]')].some(one=>!one.hidden);
}
words.addEventListener('input',apply);boxes.forEach(b=>b.addEventListener('change',apply));
"""
